"""The instruction in front of a query, as the paper and its published model write it."""

WHOLE = "{text}"


def query_prompt(task: str) -> str:
    """`f"Instruct: {task}\\nQuery: "`; of "query: {text}", a whole prompt, "query: "; "" for ""."""
    if task.endswith(WHOLE):
        return task.removesuffix(WHOLE)
    return f"Instruct: {task}\nQuery: " if task else ""


def task_of(prompt: str) -> str:
    """The task whose query_prompt it is."""
    if not prompt:
        return ""
    task = prompt.removeprefix("Instruct: ").removesuffix("\nQuery: ")
    return task if task and query_prompt(task) == prompt else prompt + WHOLE
