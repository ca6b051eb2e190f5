"""The instruction in front of a query, as the paper and its published model write it."""

from nemo_embed_core.errors import UserError

WHOLE = "{text}"


def query_prompt(task: str) -> str:
    """`f"Instruct: {task}\\nQuery: "`; of "query: {text}", a whole prompt, "query: "; "" for ""."""
    if task.endswith(WHOLE):
        return task.removesuffix(WHOLE)
    if WHOLE in task:
        raise UserError(f"task {task!r}: {WHOLE} has to be its end, as texts stand behind their prompt")
    return f"Instruct: {task}\nQuery: " if task else ""


def task_of(prompt: str) -> str:
    """The task whose query_prompt it is."""
    if not prompt:
        return ""
    task = prompt.removeprefix("Instruct: ").removesuffix("\nQuery: ")
    return task if task and WHOLE not in task and query_prompt(task) == prompt else prompt + WHOLE
