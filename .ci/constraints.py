"""constraints.txt from the environment that runs this: the exact versions of what setup.py asks for, directly
and indirectly.

    make constraints

torch is left out with all that only torch asks for (triton, CUDA): its build depends on the machine, and the
Makefile names it.
"""

import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("eval", "demo", "log", "inspect", "dev")  # those that the Makefile installs
OF_THE_MACHINE = {"torch", "triton", "setuptools"}  # torch pins the other two


def needed(name: str, extras: tuple[str, ...], found: dict[str, str]) -> dict[str, str]:
    """found, and name's requirements in it: {name: version}."""
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        marker, key = requirement.marker, canonicalize_name(requirement.name)
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))
        if wanted and key not in OF_THE_MACHINE:
            is_new = key not in found
            found[key] = distribution(key).version
            if is_new or requirement.extras:
                needed(key, tuple(requirement.extras), found)
    return found


if __name__ == "__main__":
    python = ".".join(map(str, sys.version_info[:2]))
    print(
        f"# Made by `make constraints` on Python {python}: "
        f"what the two commands install and the tests have passed with."
    )
    for name, version in sorted(needed("nemo_embed_core", EXTRAS, {}).items()):
        print(f"{name}=={version}")
