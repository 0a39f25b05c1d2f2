"""What runs in the child process of `lfjax.bounded`: programs of strangers, in bounded time and memory.

It is started as a script, and imports the standard library and, where a request needs it, one library: jinja2,
tokenizers or sentencepiece. A request is a line of JSON on standard input, its answer a line of JSON on standard
output; it ends with its input.
"""

import base64
import contextlib
import datetime
import json
import random
import resource
import signal
import sys
import time

MOST_TEXT = 1 << 26  # characters of an answer
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
            made = try_vocabulary(request) if "vocabulary" in request else render(request)
            answer = json.dumps(made, ensure_ascii=False).encode("utf-8", "surrogatepass")
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
    texts, room = [], MOST_TEXT
    for count, generation, hidden, marks in request["wanted"]:
        messages = [dict(message) for message in request["messages"][:count]]
        if hidden is not None:
            messages[hidden]["content"] = HIDDEN
        environment.marks = MARKS if marks else ("", "")
        random.seed(0)
        try:
            text = template.render(messages=messages, add_generation_prompt=generation, **request["values"])
        except MemoryError:
            raise
        except Exception as error:  # a template can fail in any way
            texts.append({"error": _line(error)})
            continue
        room -= len(text)
        if room < 0:
            raise MemoryError
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


PROBES = (
    "The quick brown fox; Ünïcödé, \u0301 Ελληνικά Русский עברית العربية हिन्दी বাংলা தமிழ் ไทย ქართული Հայերեն አማርኛ "
    "ខ្មែរ မြန်မာ 中文 日本語 かな 한국어 😀👍🏽 x = [1.5, -2] # {}()\r\n\t\u200d\ufeff\x00\x7f",
    *(run * 200 + other for run, other in ("ab", "78", " x", "-+", "\n.", "中文", "éa")),
)


def try_vocabulary(request: dict) -> dict:
    """Loads a vocabulary and takes short texts and long runs through it and back.

    Args:
      request: vocabulary: a tokenizer.json's text (library "tokenizers"), or a model in base64 ("sentencepiece").
    Returns:
      {"seconds": processor time a character, of the probe that took longest; "text": how that begins}.
    """
    if request["library"] == "tokenizers":
        import tokenizers

        made = tokenizers.Tokenizer.from_str(request["vocabulary"])
        made.no_truncation()
        made.no_padding()

        def both_ways(text: str):
            made.decode(made.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)

    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(base64.b64decode(request["vocabulary"]))
        processor.IdToPiece(list(range(processor.vocab_size())))

        def both_ways(text: str):
            processor.Decode(processor.Encode(text))

    both_ways("a")  # what is set up at the first use
    found = []
    for text in PROBES:
        began = time.process_time()
        both_ways(text)
        found.append(((time.process_time() - began) / len(text), text[:8]))
    seconds, text = max(found)
    return {"seconds": seconds, "text": text}


if __name__ == "__main__":
    main()
