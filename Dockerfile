# The commands in a container, with the versions of constraints.txt; docs/install.md says how to run it.
#
#   docker build -t nemo-embed .
#   docker build -t nemo-embed --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .     # CUDA's image, for what it brings besides
#   docker build -t nemo-embed --build-arg TORCH_INDEX=ADDRESS .                          # torch of another index: a CPU build, another CUDA
#
# torch's wheel brings CUDA's libraries itself; of the machine it needs the driver and NVIDIA's container toolkit.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG EXTRAS=eval,log,inspect,synthesize

# gcc for Triton, which compiles a launcher of each kernel; Python where the base has none.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
 && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first: a change of the code installs it no second time.
WORKDIR /opt/nemo_embed_core
COPY constraints.txt ./
RUN pip install "$TORCH" -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}

COPY setup.py pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY launch launch
COPY nemo_embed_core nemo_embed_core
COPY configs configs
RUN pip install "$TORCH" -c constraints.txt --editable ".[$EXTRAS]"

# Not root; and any other user, as `docker run --user` names one to whom the mounted folder belongs.
RUN useradd --create-home --uid 10001 embed && mkdir /work && chown embed /work && chmod 1777 /home/embed
ENV HOME=/home/embed USER=embed
USER 10001
WORKDIR /work
CMD ["nemo-embed", "--help"]
