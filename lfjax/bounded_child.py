"""What runs in the child process of `lfjax.bounded`: programs of strangers, in bounded time and memory.

Templates are rendered, vocabularies tried, regexes matched. It is started as a script, and imports the standard
library and, where a request needs it, one library: jinja2, tokenizers or sentencepiece. A request is a line of JSON on
standard input, its answer a line of JSON on standard output; it ends with its input.
"""

import base64
import contextlib
import datetime
import functools
import json
import random
import re
import resource
import signal
import sys
import time
import unicodedata

MOST_TEXT, MOST_ANSWER = 1 << 22, 1 << 26  # characters of a rendering, and of all in an answer
MARKS = "\ufdd1", "\ufdd2"  # around what a template marks with {% generation %}; no characters, so in no text
HIDDEN = "\ufdd0"  # in place of a message's content
TODAY = datetime.datetime(2024, 7, 26)  # what templates are told: with the real date a resumed run would differ


def main() -> None:
    """Answers requests until there are no more; each says its seconds of processor time. Argument: bytes of memory."""
    memory = int(sys.argv[1])
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # meant for the parent, which may go on for a while
        signal.signal(name, signal.SIG_IGN)
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # what it sends at the end ends the process
            run = next(kind for key, kind in KINDS.items() if key in request)
            answer = json.dumps(run(request), ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            answer = b'{"failure": "memory"}'
        except BaseException as error:  # a panic of a library's is no Exception
            answer = json.dumps({"failure": _line(error)}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def render(request: dict) -> dict:
    """Renderings of one conversation.

    Args:
      request: template, messages, values (what the template knows beside them) and wanted: [how many of the messages,
        whether with the generation prompt, whose content is hidden (an index, or null), whether with marks] each.
    Returns:
      {"texts": [{"text": ...} or {"error": ...}, ...]}, or {"syntax": [line or null, what is wrong]}.
    """
    try:
        environment, template = compiled(request["template"])
    except MemoryError:
        raise
    except Exception as error:  # it can be nested too deep, for one
        return {"syntax": [getattr(error, "lineno", None), _line(error)]}
    texts, room = [], MOST_ANSWER
    for count, generation, hidden, marks in request["wanted"]:
        messages = [dict(message) for message in request["messages"][:count]]
        if hidden is not None:
            messages[hidden]["content"] = HIDDEN
        environment.marks = MARKS if marks else ("", "")
        random.seed(0)
        try:
            text = template.render(messages=messages, add_generation_prompt=generation, **request["values"])
            text.encode()  # half of a surrogate pair is no text
        except MemoryError:
            raise
        except Exception as error:  # a template can fail in any way
            texts.append({"error": _line(error)})
            continue
        room -= len(text)
        if room < 0 or len(text) > MOST_TEXT:
            raise ValueError(f"it makes more than {MOST_TEXT} characters of one conversation")
        texts.append({"text": text})
    return {"texts": texts}


_COMPILED: dict = {}


def compiled(source: str):
    """(environment, template): Jinja's immutable sandbox, with what chat templates know in transformers."""
    if source in _COMPILED:
        return _COMPILED[source]
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %}: what the assistant says, between marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller) -> str:
            return caller().join(self.environment.marks)  # type: ignore

    def fail(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda text: TODAY.strftime(text)}
    _COMPILED[source] = environment, environment.from_string(source)
    return _COMPILED[source]


def match(request: dict) -> dict:
    """The first of several regexes that matches each name, from its start.

    Args:
      request: patterns and names. A pattern that names a group "idx" tells what that is.
    Returns:
      {"found": [None or [index of the pattern, "idx" or None], for each name]}, or {"wrong": [index, what is wrong]}.
    """
    patterns = []
    for index, source in enumerate(request["patterns"]):
        try:
            patterns.append(re.compile(source))
        except MemoryError:
            raise
        except Exception as error:  # of the syntax, or nested too deep
            return {"wrong": [index, _line(error)]}

    def first(name: str):
        for index, pattern in enumerate(patterns):
            if found := pattern.match(name):
                return [index, found.groupdict().get("idx")]
        return None

    return {"found": [first(name) for name in request["names"]]}


MOST_GROWTH, MOST_MORE = 20, 100  # a text may become so many times as long, and so many characters longer
MOST_REPLACED = 100  # times, by all that replaces one text by another
MOST_NAMED = 5000  # texts that a vocabulary's rules name
SCRIPTS_END, SCRIPTS_STEP = 0x20000, 8  # from there on there are ideographs alone; a script's letters fill more columns
SCRIPT_RUN = 40  # characters: a regex that tries every way to part them takes 2^40 steps, and every cubic one few
PROBES = (
    "The quick brown fox; Ünïcödé, \u0301 Ελληνικά Русский עברית العربية हिन्दी বাংলা தமிழ் ไทย ქართული Հայերեն አማርኛ "
    "ខ្មែរ မြန်မာ 中文 日本語 かな 한국어 😀👍🏽 x = [1.5, -2] # {}()\r\n\t\u200d\ufeff\x00\x7f",
    *(run * 200 + other for run, other in ("ab", "78", " x", "-+", "\n.", "中文", "éa")),
)


@functools.cache
def scripts() -> tuple[str, ...]:
    """A run of letters of every script, large and small, and of every category of characters, each with a sign behind.

    Python knows no scripts; the first words of a letter's name are its script's.
    """
    groups: dict[str, str] = {}
    for character in map(chr, range(0, SCRIPTS_END, SCRIPTS_STEP)):
        category = unicodedata.category(character)
        words = unicodedata.name(character, "").split()[:2] if category[0] == "L" else []
        for group in (category, " ".join(word for word in words if word.replace("-", "").isalpha())):
            groups[group] = (groups.get(group, "") + character)[:4]
    return tuple((group * SCRIPT_RUN)[:SCRIPT_RUN] + "!" for name, group in groups.items() if name not in ("", "Cs"))


def try_vocabulary(request: dict) -> dict:
    """Loads a vocabulary and takes short texts and runs of every script, and of what it names, through it and back.

    Args:
      request: vocabulary: a tokenizer.json's text (library "tokenizers"), or a model in base64 ("sentencepiece").
    Returns:
      {"seconds": processor time a character, of the probe that took longest; "text": how that begins}.
    Raises:
      ValueError: a text grows beyond what is allowed.
    """
    named: list[str] = []
    if request["library"] == "tokenizers":
        import tokenizers

        made = tokenizers.Tokenizer.from_str(request["vocabulary"])
        made.no_truncation()
        made.no_padding()
        spec = json.loads(request["vocabulary"])
        named = probes_of([spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")])
        for name in ("normalizer", "decoder"):
            if (times := replaced(spec.get(name))) > MOST_REPLACED:
                raise ValueError(
                    f"its {name} makes a text {times:.0f} times as long, at most {MOST_REPLACED} is allowed"
                )

        def both_ways(text: str):
            if made.normalizer is not None:
                check_growth(text, len(text), made.normalizer.normalize_str(text))
            encoded = made.encode(text, add_special_tokens=False)
            check_growth(text, sum(map(len, encoded.tokens)), made.decode(encoded.ids, skip_special_tokens=False))

        for token, i in made.get_vocab(with_added_tokens=True).items():
            check_growth(token, len(token), made.decode([i], skip_special_tokens=False))
    else:
        import sentencepiece

        model = base64.b64decode(request["vocabulary"])
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        processor.IdToPiece(list(range(processor.vocab_size())))
        for charsmap in charsmaps(model):
            if (times := longest(charsmap)) > MOST_REPLACED:
                raise ValueError(f"it makes a character {times} characters, at most {MOST_REPLACED} are allowed")

        def both_ways(text: str):
            processor.Decode(processor.Encode(text))

    both_ways("a")  # what is set up at the first use
    found = []
    for text in (*PROBES, *scripts(), *named):
        began = time.process_time()
        both_ways(text)
        found.append(((time.process_time() - began) / len(text), text[:8]))
    seconds, text = max(found)
    return {"seconds": seconds, "text": text}


def check_growth(text: str, length: int, made: str) -> None:
    """Raises ValueError where what was made of a text of this length is too long."""
    if len(made) > MOST_GROWTH * length + MOST_MORE:
        raise ValueError(f"{length} characters ({text[:8]!r}...) become {len(made)}")


def probes_of(rules: list) -> list[str]:
    """Runs of every text, and of every character of every regex, that a vocabulary's rules name.

    Behind a run stands a character that none of them names, so that no regex matches to the end.
    """
    texts: dict[str, None] = {}

    def gather(node) -> None:
        if isinstance(node, list):
            for part in node:
                gather(part)
        elif isinstance(node, dict):
            for key, part in node.items():
                if key == "Regex" and isinstance(part, str):
                    texts.update(dict.fromkeys(literals(part)))
                elif key not in ("type", "precompiled_charsmap"):
                    gather(part)
        elif isinstance(node, str) and node:
            texts[node] = None

    gather(rules)
    if len(texts) > MOST_NAMED:
        raise ValueError(f"its rules name {len(texts)} texts, at most {MOST_NAMED} are allowed")
    whole = "".join(texts)
    other = next(chr(code) for code in range(0x21, 0x3000) if chr(code) not in whole)
    return [text * max(3, min(200, 4000 // len(text))) + other for text in texts]


def literals(pattern: str) -> list[str]:
    """Characters and words that a regex may look for."""
    codes = re.findall(r"\\(?:x([0-9a-fA-F]{2})|x\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4}))", pattern)
    numbers = [int("".join(code), 16) for code in codes]
    spelt = [chr(number) for number in numbers if number < 0xD800 or 0xDFFF < number < 0x110000]
    return [*pattern, *re.findall(r"[^\W_]{2,}", pattern), *spelt]


def replaced(rules) -> float:
    """How many times as long a text becomes where each replacement by these rules does its most."""
    if isinstance(rules, list):
        times = 1.0
        for part in rules:
            times = min(times * replaced(part), 1e9)
        return times
    if not isinstance(rules, dict):
        return 1.0
    pattern, content, charsmap = (rules.get(key) for key in ("pattern", "content", "precompiled_charsmap"))
    if isinstance(charsmap, str):
        return max(1.0, longest(base64.b64decode(charsmap)))
    if isinstance(pattern, dict) and isinstance(content, str):
        text = pattern.get("String")
        return max(1.0, len(content) / (len(text) if isinstance(text, str) and text else 1))
    return replaced(list(rules.values()))


def longest(charsmap: bytes) -> int:
    """Characters of the longest replacement of SentencePiece's table: a trie behind its size, then texts ended by 0."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0"))


def charsmaps(model: bytes):
    """The tables of a SentencePiece model: of its normalizer_spec and denormalizer_spec."""
    for field, spec in fields(model):
        if field in (3, 5):
            yield from (value for inner, value in fields(spec) if inner == 2)


def fields(message: bytes):
    """(number, content) of the fields of a protobuf message that hold bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < len(message) and shift < 70:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("its fields are damaged")

    while place < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            varint()
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            size = varint()
            yield key >> 3, message[place : place + size]
            place += size
        else:
            raise ValueError("its fields are damaged")


KINDS = {"vocabulary": try_vocabulary, "patterns": match, "template": render}  # by a field of the request


if __name__ == "__main__":
    main()
