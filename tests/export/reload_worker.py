"""export/reload.py in forked processes on request: several folders for the price of one import of both
libraries.

Reads one JSON object per line: {"argv": ["reload.py", FOLDER, REQUEST, OUTPUT], "env": {...}}; answers
{"code", "stderr"}.
"""

import json
import os
import sys

import sentence_transformers
import transformers
from launch_worker import run

_ = transformers.AutoModel, transformers.AutoTokenizer, transformers.LlamaModel
_ = sentence_transformers.SentenceTransformer

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["argv"], request["env"])), file=answers, flush=True)
