"""The instruction in front of a query, as the paper and its published model write it."""


def query_prompt(task: str) -> str:
    """`f"Instruct: {task}\\nQuery: "`, or "" for "" (the text as it is)."""
    return f"Instruct: {task}\nQuery: " if task else ""
