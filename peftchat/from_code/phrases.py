"""Phrasings of questions; the fields in braces are filled per question."""

WHAT = {
    "function": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Can you explain `{name}` to me?",
        "I came across `{name}` in some code. What does it do?",
        "When would I use `{name}`?",
        "Tell me about the function `{name}`.",
    ),
    "method": (
        "What does the `{short}` method of `{owner}` do?",
        "What does `{name}` do?",
        "What is `{short}` for on {a_owner}?",
        "Explain the method `{name}`, please.",
        "What happens when I call `{short}` on {a_owner}?",
    ),
    "property": (
        "What is `{short}` on {a_owner}?",
        "What does the `{short}` property of `{owner}` tell me?",
        "What do I get from `{name}`?",
    ),
    "class": (
        "What is `{name}`?",
        "What is the class `{name}` for?",
        "When would I use `{name}`?",
        "Can you explain what `{name}` is?",
        "Tell me about `{name}`.",
    ),
    "module": (
        "What is the `{name}` module for?",
        "What does the module `{name}` offer?",
        "Give me an overview of `{name}`.",
        "What can I do with the `{name}` module?",
        "I have never used `{name}`. What is in it?",
    ),
}
CALL = {
    "function": (
        "How do I call `{name}`?",
        "Show me how to use `{name}`.",
        "Give me an example of a call of `{name}`.",
        "How is `{name}` used?",
        "Write a short example that calls `{name}`.",
    ),
    "method": (
        "How do I call `{short}` on {a_owner}?",
        "Show me how to use `{name}`.",
        "Give me an example of `{name}`.",
    ),
    "property": ("How do I read `{short}` from {a_owner}?", "Show me how to use `{name}`."),
    "class": (
        "How do I create {a_name}?",
        "Show me how to make an instance of `{name}`.",
        "What arguments does `{name}` need?",
    ),
}
CALL_NEXT = (
    "Show me how to call it.",
    "How do I call it?",
    "Can you give me an example?",
    "Show me an example.",
    "What does that look like in code?",
)
CREATE_NEXT = ("How do I create one?", "Show me how to make one.", "Can you show me that in code?")
READ_NEXT = ("How do I read it?", "Show me that in code.")
FIND = (
    "How do I {task} with `{module}`?",
    "Which {kind} of `{module}` can I use to {task}?",
    "I want to {task}. What does `{module}` have for that?",
    "Is there something in `{module}` to {task}?",
)
WRITE = {
    "plain": (
        "Write a Python function `{signature}` to {task}.",
        "Write `{signature}` in Python. It should {task}.",
        "I need a function `{signature}` to {task}. Can you write it?",
        "Implement `{signature}`: it should {task}.",
    ),
    "described": (
        'Write a Python function `{signature}` with this description: "{description}"',
        'Implement `{signature}`. Its docstring says: "{description}"',
    ),
    "method": (
        "Write the method `{signature}` of a class `{owner}`. It should {task}.",
        "How could the method `{signature}` of `{owner}` be implemented? It should {task}.",
    ),
}
WROTE = ("Here is `{short}`:", "This does it:", "One way to write it:", "You can write `{short}` like this:")
EXPLAIN = (
    "Explain this code:",
    "What does this code do?",
    "Can you walk me through this function?",
    "What is happening here?",
    "I do not understand this function. What does it do?",
)
EXPLAIN_NEXT = ("How does it work?", "Can you explain how that works?", "Explain the code, please.")
PARAMETERS = (
    "Which arguments does `{name}` take?",
    "What parameters does `{name}` have?",
    "What can I pass to `{name}`?",
)
DEFAULT_NEXT = (
    "What is the default of `{parameter}`?",
    "Do I have to pass `{parameter}`?",
    "What if I leave out `{parameter}`?",
)
PARAMETER = (
    "What is the `{parameter}` argument of `{name}`?",
    "What does `{parameter}` mean in `{name}`?",
    "What should I pass as `{parameter}` to `{name}`?",
)
RAISES = (
    "Which errors can `{name}` raise?",
    "When does `{name}` fail?",
    "What exceptions should I expect from `{name}`?",
)
RAISES_NEXT = ("Can it raise an error?", "Which exceptions should I handle?", "When does it fail?")
MEMBERS = {
    "class": ("Which methods does `{name}` have?", "What can I do with {a_name}?", "List the methods of `{name}`."),
    "module": ("What functions are in `{name}`?", "List what `{name}` contains.", "What should I know from `{name}`?"),
}
MEMBERS_NEXT = {
    "class": ("Which methods does it have?", "What can I do with one?"),
    "module": ("Which functions does it have?", "What is in it?", "What should I look at first?"),
}
