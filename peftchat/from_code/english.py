"""English grammar for docstrings: conjugation, articles and sentences."""

import re
from collections.abc import Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VERBS = _words("""
accept accumulate acquire activate add adjust advance allow analyze append apply archive arrange assemble
assert assign associate attach attempt await bind block bound break broadcast build bump cache calculate
call cancel capitalize cast catch center change check choose clean clear clip clone close coerce collapse
collect combine compare compile compose compress compute concatenate configure connect construct consume
convert copy count create crop cut deactivate decide declare decode decompress decorate decrease decrement
decrypt dedent defer define delegate delete derive describe deserialize destroy detach detect determine
disable discard disconnect dispatch display divide download draw drop dump duplicate emit empty enable
encode encrypt end enforce enqueue ensure enter enumerate erase escape estimate evaluate examine exchange
exclude execute exit expand explain export expose express extend extract feed fetch fill filter find finish
fit flatten flush fold force format forward freeze generate get give glob grab group guess handle hash hide
hold identify ignore implement import increase increment indent indicate infer inform inherit init
initialize inject insert inspect install instantiate intercept interpret invoke isolate issue iterate join
jump keep launch leave limit list listen load locate lock log look make map mark mask match measure merge
mix modify monitor mount move multiply normalize note notify obtain offer open order output override pack
pad parse partition pass patch pause perform permute pick pickle place plot poll pop populate predict prepare
prepend present preserve press prevent print process produce project prompt provide prune publish pull push
put query queue quote raise randomize rank reach read rebuild recalculate receive recognize record recover
reduce reformat refresh register reject release reload remove rename render reopen repeat replace report
represent request reraise reset reshape resize resolve restore restrict retrieve retry return reuse reverse
revert rewrite roll rotate round run sample save scale scan schedule score search seed seek select send
separate serialize serve set setup shift show shuffle shut shutdown signal simplify simulate skip sleep
slice solve sort specify split squash start stop store stream stringify strip submit subtract suggest sum
summarize supply suppress suspend swap switch synchronize take tell terminate test throw tidy toggle
tokenize track train transform translate transpose traverse trigger trim truncate try turn undo unescape
unlink unload unlock unpack unquote unregister unwind unwrap update upgrade upload validate verify view
visit wait wake walk warn watch wrap write yield zip
do pretty-print clean-up
""")
_ALWAYS_VERBS = _words("append check convert insert join listen raise read remove return send sleep wait write")
_PREPOSITIONS = _words("for from in into on over to with")
_DETERMINERS = _words("a an the it its them all each any every only no this that these those their one two both")
_MODULE_NOUNS = _words("classes constants decorators functions helpers routines support tools utilities")
_ASIDE = re.compile(
    r"(please )?(see|note|refer|example|usage|cf|todo|xxx|fixme|warning|deprecated|new in|changed in|for more|"
    r"for details)\b",
    re.I,
)
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|incl|approx|Dr|Mr|Ms|St|No|Fig|resp)\.$")
_SENTENCE_END = re.compile(r"(?<=[.!?])['\")]?\s+(?=[A-Z`'\"(*])")
_NOUN_OPENERS = re.compile(
    r"(abstract|base|class|concrete|context manager|convenience|coroutine|decorator|dict|error|exception|factory|"
    r"function|generator|handler|helper|hook|iterator|list|mapping|metaclass|method|mixin|named tuple|object|shortcut|"
    r"shorthand|simple|special|subclass|utility|wrapper)\b",
    re.I,
)


def third_person(verb: str) -> str:
    """Return the third person singular of a verb: `copies` for `copy`."""
    if verb in {"do", "go"} or verb.endswith(("s", "x", "z", "ch", "sh")):
        return verb + "zes" if verb.endswith("z") and not verb.endswith("zz") else verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


_THIRD_PERSON = {verb: third_person(verb) for verb in _VERBS}
_CONJUGATED = frozenset(_THIRD_PERSON.values())


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph into sentences; abbreviations do not end one."""
    found: list[str] = []
    for piece in _SENTENCE_END.split(paragraph):
        if found and _ABBREVIATIONS.search(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return [sentence.strip() for sentence in found if sentence.strip()]


def is_aside(sentence: str) -> bool:
    """Return whether a sentence only refers elsewhere ("See …", "Note …")."""
    return bool(_ASIDE.match(sentence)) or sentence.endswith(":")


def infinitive_phrase(sentence: str) -> str | None:
    """Return an imperative sentence as an infinitive without "to".

    `Copy data.` gives `copy data`; any other sentence gives None.
    """
    match = re.fullmatch(r"((?:[A-Za-z]+ly )?)([A-Za-z]+(?:-[a-z]+)?) (\S.*)", sentence.rstrip(".! "))
    if match is None or match[2].isupper():
        return None
    adverb, verb, rest = match[1].lower(), match[2].lower(), match[3]
    if verb not in _THIRD_PERSON or re.match(r"of\b|for which\b|(\w+ )?(is|are|was)\b", rest):
        return None
    if verb in {"call", "override", "implement", "do"} and re.match(r"(this|in|not)\b", rest):
        return None  # an instruction to the reader, not a description
    return f"{adverb}{verb} {rest}"


def sentence_about(subject: str, sentence: str, *, kind: str) -> str | None:
    """Return a sentence with `subject` as its subject.

    It is None if the form of the sentence is not recognized.

    Args:
        subject: the subject, such as "`shutil.copy2`" or "It".
        sentence: one sentence of the object's docstring.
        kind: "function", "method", "property", "class" or "module".
    """
    text = sentence.rstrip(". ").strip()
    head, _, rest = text.partition(" ")
    lower = head.lower().rstrip(",")
    if not rest:
        return None
    if subject.endswith(f"{head}`") and re.match(r"(is|are|has|can|will|provides|represents)\b", rest):
        return f"{subject} {rest}."
    if phrase := infinitive_phrase(text):
        return f"{subject} {_conjugate(phrase)}."
    if lower in _CONJUGATED:
        return f"{subject} {_lower_first(text)}."
    if match := re.match(
        r"(this|the) (class|function|method|module|package|object|decorator)\s+(?=[a-z]+s\b)", text, re.I
    ):
        return f"{subject} {text[match.end() :]}."
    if match := re.match(r"(true|false) (if|when|iff)\b", text, re.I):
        verb = "is" if kind == "property" else "returns"
        return f"{subject} {verb} `{match[1].title()}` {match[2]}{text[match.end() :]}."
    if lower == "whether":
        return f"{subject} tells {_lower_first(text)}."
    if lower == "like" and kind in {"function", "method"}:
        return f"{subject} works {_lower_first(text)}."
    if kind == "module" and lower in _MODULE_NOUNS:
        return f"{subject} offers {_lower_first(text)}."
    if lower in {"like", "raised", "called", "used", "equivalent", "similar", "useful"}:
        return f"{subject} is {_lower_first(text)}."
    if match := re.fullmatch(r"same as (?P<code>\S+ [^\w\s]+ \S+|[^\w\s]\S*)", text, re.I):
        return f"{subject} is the same as `{match['code']}`."
    if lower == "same":
        return f"{subject} is the {_lower_first(text)}."
    if lower in {"a", "an"} or (lower == "the" and kind in {"class", "property"}):
        return f"{subject} is {_lower_first(text)}." if not _has_finite_verb(rest) else None
    if (kind == "class" and _reads_as_noun(text)) or (kind != "module" and _NOUN_OPENERS.match(text)):
        noun = _lower_first(text)
        return f"{subject} is {article(noun)} {noun}."
    return None


def following_sentence(sentence: str) -> str:
    """Return a later sentence of a docstring; an imperative gets the subject "It"."""
    text = sentence.rstrip()
    if phrase := infinitive_phrase(text):
        return f"It {_conjugate(phrase)}."
    head, _, rest = text.partition(" ")
    if rest and head.lower() in _CONJUGATED:
        return f"It {_lower_first(text).rstrip('.')}."
    if rest and head in {"Can", "Cannot", "May", "Must", "Should", "Will", "Is", "Has"}:
        return f"It {_lower_first(text).rstrip('.')}."
    match = re.match(r"((?:If|When|Otherwise|By default)\b[^,.]*,) (?=[a-z])", text)
    if match and (phrase := infinitive_phrase(text[match.end() :])):
        return f"{match[1]} it {_conjugate(phrase)}."
    return text if text.endswith((".", "!", "?")) else text + "."


def article(noun: str) -> str:
    """Return `a` or `an`, by the sound that the word most likely starts with."""
    word = noun.split()[0].strip("`*")
    if re.match(r"(uni|use|usu|eu|one\b|once)", word, re.I) and not re.match(r"unin|unim", word, re.I):
        return "a"
    if re.fullmatch(r"[A-Z]{2,}s?", word):  # spelled out: an XML file, a UUID
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if re.match(r"(hour|honest|heir)", word, re.I):
        return "an"
    return "an" if word[:1].lower() in tuple("aeiou") else "a"


def join_words(words: Sequence[str], *, last: str = "and") -> str:
    """Join words as a list: `a`, `a and b`, `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _conjugate(phrase: str) -> str:
    """Conjugate the first verb of a phrase and the verbs joined to it.

    `split it and return the list` gives `splits it and returns the list`.
    """
    first, _, rest = phrase.partition(" ")
    adverb = f"{first} " if first not in _THIRD_PERSON else ""
    head, _, rest = rest.partition(" ") if adverb else (first, "", rest)

    def joined(match: re.Match[str]) -> str:
        before = rest[: match.start()]
        following = match["next"].lower().lstrip("`")
        sure = match["verb"] in _ALWAYS_VERBS and following in _PREPOSITIONS
        if match["verb"] not in _THIRD_PERSON or not (sure or following in _DETERMINERS):
            return match[0]
        if re.search(r"\b(to|can|will|may|must|should|would|could|not|that|which)\b", before):
            return match[0]
        return f"{match['link']}{_THIRD_PERSON[match['verb']]} {match['next']}"

    if (pair := re.match(r"(and|or) ([a-z]+) ", rest)) and pair[2] in _VERBS:
        return f"{adverb}{_THIRD_PERSON[head]} {pair[1]} {_conjugate(rest[pair.end(1) + 1 :])}"
    linked = re.sub(r"(?P<link>, and | and |, then | and then |; |, )(?P<verb>[a-z]+) (?P<next>`?[\w']+)", joined, rest)
    return f"{adverb}{_THIRD_PERSON[head]} {linked}"


def _lower_first(text: str) -> str:
    """Return text with a lower-case first letter.

    A name or an abbreviation at the start keeps its capitals.
    """
    head = re.split(r"[\s,/-]", text, maxsplit=1)[0]
    return text if not head[1:].islower() and len(head) > 1 else text[:1].lower() + text[1:]


def _reads_as_noun(text: str) -> bool:
    words = re.findall(r"[\w'-]+", text)
    if (
        not words
        or len(words) < 3
        or words[0].lower() in {"this", "these", "it", "if", "when", "you", "in", "on", "for"}
    ):
        return False
    phrase = re.split(r"\b(?:that|which|whose|where|who|to|with|for|of|when|in|by)\b", text)[0]
    if any(word.endswith("s") and not word.endswith(("ss", "us", "is")) for word in (words[0], phrase.split()[-1])):
        return False  # a plural takes no article
    return not _has_finite_verb(phrase)


def _has_finite_verb(text: str) -> bool:
    return bool(
        re.search(
            r"\b(is|are|was|has|have|can|will|may|must|should|does|do)\b",
            re.split(r"\b(?:that|which|whose|where|who|when|if)\b", text)[0],
        )
    )
