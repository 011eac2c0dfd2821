"""Chat templates: Jinja as transformers runs it, within limits, because a checkpoint's template is foreign code.

A template sees what transformers' `apply_chat_template` gives it: messages, `add_generation_prompt`, the tokeniser's
special tokens, `tools` and `documents` (none), `raise_exception`, `strftime_now`, `tojson` without HTML escapes, the
tags `generation`, `break` and `continue`. Jinja's sandbox keeps it from Python's insides; `_Budget` bounds its work:
every turn of a loop, call of a macro and item of a list is a step, every text that is built counts by its length
before it is built, and what a single call may be asked for is bounded too. Source of the rules:
transformers utils/chat_template_utils.py.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_SOURCE = 1 << 20  # characters of a template
MAX_STEPS = 1_000_000
MAX_TEXT = 1 << 26  # characters built in one rendering, all texts together
MAX_NUMBER = 10_000  # of an integer that a filter or a text's method is given, as a width say
MAX_BITS = 4096  # of an integer
SECONDS = 20.0  # a real conversation takes milliseconds
_PLAIN_METHODS = ("format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate")


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], **variables: Any) -> str:
    """The conversation as the model's text. `tokens` are the special tokens by their names.

    ValueError, saying why, for a template that does not compile, fails, or does more than the limits allow.
    """
    budget = _Budget(time.monotonic() + SECONDS)
    place = _BUDGET.set(budget)
    chat = [_with_reasoning(_plain(message)) for message in messages]
    try:
        compiled = _compiled(template)
        given = {"tools": None, "documents": None, **tokens, **_plain(variables)}
        text = "".join(_counted(compiled.generate(messages=chat, **given), budget))
    except Exception as error:  # of foreign code: anything that Python raises
        raise ValueError(f"the chat template failed: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        _BUDGET.reset(place)
    return text


@dataclasses.dataclass
class _Budget:
    """What a rendering may still do."""

    deadline: float
    steps: int = MAX_STEPS
    text: int = MAX_TEXT

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes longer than {SECONDS:.0f} s")

    def build(self, length: int) -> None:
        """Asked before a text of so many characters is made."""
        self.text -= length
        if self.text < 0:
            raise SecurityError(f"it builds more than {MAX_TEXT} characters")

    def measure(self, value: Any) -> Any:
        """Counts a value with all that it holds, however often the same part stands in it; returns it."""
        self.step()
        if isinstance(value, str):
            self.build(len(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.measure(key)
                self.measure(item)
        elif isinstance(value, list | tuple | set):
            for item in value:
                self.measure(item)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError(f"it computes a number of {value.bit_length()} bits")
        return value


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def _counted(items: Iterable[Any], budget: _Budget) -> Iterator[Any]:
    for item in items:
        budget.step()
        yield item


def _operate(operator: str, left: Any, right: Any) -> None:
    """Counts the result of a binary operator before it is computed."""
    budget = _BUDGET.get()
    budget.step()
    if operator == "%" and isinstance(left, str):
        _check_format(left, (right,))
    sized = [value for value in (left, right) if isinstance(value, str | list | tuple)]
    if operator == "*" and len(sized) == 1:
        times = right if sized[0] is left else left
        if isinstance(times, int) and times > 0:
            if isinstance(sized[0], str):
                budget.build(len(sized[0]) * times)
            else:
                budget.step(len(sized[0]) * times)
                for item in sized[0] * min(times, MAX_STEPS):
                    budget.measure(item)
    elif operator == "+" and len(sized) == 2:
        budget.measure(left)
        budget.measure(right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise SecurityError(f"it computes a number of about {bits} bits")


def _check_call(name: str, receiver: Any, arguments: Sequence[Any]) -> None:
    """Counts what a filter or a text's method could build, before it does."""
    budget = _BUDGET.get()
    budget.step()
    numbers = [value for value in arguments if isinstance(value, int) and not isinstance(value, bool)]
    if any(abs(value) > MAX_NUMBER for value in numbers):
        raise SecurityError(f"it asks {name!r} for {max(map(abs, numbers))}, expected at most {MAX_NUMBER}")
    texts = [value for value in arguments if isinstance(value, str)]
    if name in ("format", "format_map") and isinstance(receiver, str):
        _check_format(receiver, arguments)
    elif name == "join":
        separator, items = (receiver, arguments[:1]) if isinstance(receiver, str) else ("".join(texts[:1]), [receiver])
        for item in items:
            budget.measure(item)
            budget.build(len(separator) * (len(item) if hasattr(item, "__len__") else 0))
    elif isinstance(receiver, str):
        if name == "replace" and len(texts) > 1:
            budget.build(len(receiver) + receiver.count(texts[0]) * len(texts[1]))
        elif name in (*_PLAIN_METHODS, "indent", "wordwrap"):
            lines = 1 + receiver.count("\n") + receiver.count("\t") + (len(receiver) if name == "wordwrap" else 0)
            budget.build(len(receiver) + lines * max([*numbers, *map(len, texts), 1]))


def _check_format(pattern: str, arguments: Sequence[Any]) -> None:
    """Formats may repeat an argument and pad it to a width that stands in the pattern."""
    budget = _BUDGET.get()
    digits = "".join(character if character.isdigit() else " " for character in pattern).split()
    widths = [int(run) if len(run) < 9 else MAX_TEXT for run in digits]
    widest = max([*widths, *(value for value in _leaves(arguments) if isinstance(value, int)), 0])
    if widest > MAX_NUMBER:
        raise SecurityError(f"its format asks for a width of {widest}, expected at most {MAX_NUMBER}")
    before = budget.text
    for argument in arguments:
        budget.measure(argument)
    budget.build(len(pattern) + (pattern.count("{") + pattern.count("%")) * (before - budget.text + widest + 1))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


class _Limits(Extension):
    """What the compiled template calls to have its work counted."""

    identifier = "omnax.limits"

    def tick(self) -> str:
        _BUDGET.get().step()
        return ""

    def iterate(self, items: Any) -> Any:
        if hasattr(items, "__len__"):  # loops ask for the length
            _BUDGET.get().step(len(items))
            return items
        return _counted(items, _BUDGET.get())

    def literal(self, value: Any) -> Any:
        return _BUDGET.get().measure(value)

    def concat(self, *values: Any) -> str:
        parts = [str(_BUDGET.get().measure(value)) for value in values]
        return "".join(parts)


class _Counting(NodeTransformer):
    """Puts the calls of `_Limits` into a parsed template."""

    def __init__(self, limits: _Limits):
        self._limits = limits

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body = [nodes.Output([self._limits.call_method("tick")]), *node.body]
        return node

    def visit_For(self, node: nodes.For) -> Any:
        node = self._body(node)
        node.iter = self._limits.call_method("iterate", [cast(nodes.Expr, node.iter)])
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # a target of assignment
            return node
        return self._limits.call_method("literal", [node])

    visit_List = visit_Dict = visit_Tuple = _literal

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return self._limits.call_method("concat", [*node.nodes])  # type: ignore[arg-type]


class _Generation(Extension):
    """{% generation %}: marks what the assistant says. Transparent: labels come from the tokens here."""

    tags = {"generation"}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)]

    @pass_eval_context
    def _said(self, context: Any, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's, without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name, value in attributes.items():
            _Namespace._check(name)  # by its class: the attributes of a namespace are the template's own
            _BUDGET.get().measure(value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it stores the underscored attribute {name!r} in a namespace")


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)`, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return _BUDGET.get().measure(dict(*args, **kwargs))

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return _BUDGET.get().measure(dict.fromkeys(*args))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with transformers' names and with everything counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # No constants are computed while it compiles: that would go uncounted
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Limits, _Generation, loopcontrols]
        )
        self.finalize = pass_context(lambda context, value: _BUDGET.get().measure(value))
        self.filters["tojson"] = _tojson
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        limits = self.extensions[_Limits.identifier]
        assert isinstance(limits, _Limits)
        counting = _Counting(limits).visit(source)
        for node in [counting, *counting.find_all(nodes.Node)]:
            node.lineno = node.lineno or 1
            node.environment = self
        return super()._generate(counting, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if getattr(function, "__self__", None) is self.extensions[_Limits.identifier]:
            return function(*args)
        if function is not self.globals["range"]:  # which has a limit of its own
            receiver = getattr(function, "__self__", getattr(getattr(function, "__wrapped__", None), "__self__", None))
            if isinstance(receiver, str | int):
                _check_call(function.__name__, receiver, [*args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        return _BUDGET.get().measure(result)


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose work and result are counted; those that Jinja gives its context take the value second."""
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args[first], [*args[first + 1 :], *kwargs.values()])
        return _BUDGET.get().measure(function(*args, **kwargs))

    return counted


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of Jinja's own."""
    if indent is not None and indent > 100:
        raise SecurityError(f"it asks 'tojson' for an indent of {indent}, expected at most 100")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    _check_format(format, ())
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it has {len(source)} characters, expected at most {MAX_SOURCE}")
    return _Environment().from_string(source)


def _plain(value: Any) -> Any:
    """Plain JSON types alone: other objects have methods of which the sandbox knows nothing."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """What the assistant thought, under the names that templates know."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_template(documents: Mapping[str, Any], default: str, name: str | None = None) -> str:
    """The checkpoint's chat template as transformers' processor finds it, else `default`.

    chat_template.jinja goes before chat_template.json, processor_config.json and the tokeniser's own; of several named
    ones it is that of `name`, or "default". ValueError where there is none of that name.
    """
    extra = "additional_chat_templates/"
    named: dict[str, str] = {}
    for file, content in documents.items():
        if file.startswith(extra):
            named[file.removeprefix(extra).removesuffix(".jinja")] = content.decode()
    if "chat_template.jinja" in documents:
        named["default"] = documents["chat_template.jinja"].decode()
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = documents.get(file, {}).get("chat_template")
        if named or not found:
            continue
        if isinstance(found, str):
            named = {"default": found}
        elif isinstance(found, Mapping):
            named = dict(found)
        else:
            named = {entry["name"]: entry["template"] for entry in found}
    if not named and name is None:
        return default
    wanted = name or "default"
    if wanted not in named:
        raise ValueError(f"the checkpoint has no chat template {wanted!r}, but {sorted(named)[:10]}")
    return named[wanted]


def special_tokens(documents: Mapping[str, Any]) -> dict[str, str]:
    """The tokeniser's special tokens by their names; of Qwen2's class those that its class has by default."""
    config: Mapping[str, Any] = documents.get("tokenizer_config.json") or {}
    tokens: dict[str, Any] = {}
    if config.get("tokenizer_class", "Qwen2Tokenizer").removesuffix("Fast") == "Qwen2Tokenizer":
        tokens = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokens |= documents.get("special_tokens_map.json") or {}
    tokens |= {key: config[key] for key in SPECIAL_TOKENS if key in config}
    contents = {key: tokens[key]["content"] if isinstance(tokens[key], Mapping) else tokens[key] for key in tokens}
    return {key: contents[key] for key in SPECIAL_TOKENS if contents.get(key) is not None}
