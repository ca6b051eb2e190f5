"""Runs launchers in forked processes on request: thirty command lines for the price of one `import torch`.

Reads one JSON object per line: {"argv": ["launch/train.py", ...], "env": {...}}; answers {"code", "stderr",
"cpu_s"}.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback


def run(argv: list[str], env: dict[str, str]) -> dict:
    with tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if pid == 0:
            os.environ.update(env)
            os.dup2(errors.fileno(), 2)
            os.dup2(2, 1)  # stdout is the answer channel
            code = 1
            try:
                sys.argv = argv
                runpy.run_path(argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        errors.seek(0)
        cpu = usage.ru_utime + usage.ru_stime
        return {"code": os.waitstatus_to_exitcode(status), "stderr": errors.read(), "cpu_s": cpu}


if __name__ == "__main__":
    import nemo_embed_core.encoders.embedder
    import nemo_embed_core.train.trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["argv"], request.get("env", {}))), file=answers, flush=True)
