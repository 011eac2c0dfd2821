"""Chat templates beside transformers' own rendering, and templates that want too much."""

import json
import subprocess
import sys
import time

import pytest
from omnax.data.conversations.templates import read_template, render, special_tokens

CHAT = [
    {"role": "system", "content": "Be <brief> & 'é'."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "a cat", "reasoning": "whiskers"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}{{ unk_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% break %}{% endfor %}",
    "tools": "{{ tools is none }}{{ tools }}{% if not documents %}no documents{% endif %}"
    "{{ add_vision_id is defined }}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, ensure_ascii=true) }}",
    "namespace": "{% set n = namespace(a=1, b=[]) %}{% for m in messages %}{% set n.a = n.a * 2 %}{% endfor %}"
    "{{ n.a }}",
    "texts": "{{ 'a-b'.split('-')|join('+') }}{{ '%s|%5d' % ('x', 3) }}{{ '{:>4}'.format(7) }}"
    "{{ 'ab'|replace('b', 'c') }}",
    "lists": "{{ [1, 2] + [3] }}{{ (1, 'b') }}{{ {'k': [0] * 3}.items() | list }}{{ range(3)|list }}"
    "{{ 'a' ~ 1 ~ none }}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% set x, y = 1, 2 %}{{ x + y }}",
    "macro": "{% macro f(x, n=2) %}{{ x * n }}{{ caller() if caller }}{% endmacro %}{{ f('ab') }}"
    "{% call f('c') %}!{% endcall %}",
    "filters": "{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}"
    "{{ ' x '|trim }}{{ messages[::-1][0].role|upper }}{{ 'ab\ncd'|indent(3) }}{{ [3, 1]|sort|first }}{{ 'é<'|e }}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['a', 'b'], 0) }}{% if '<' in messages[0].content %}in{% endif %}",
    "whitespace": "  {% if add_generation_prompt %}\n  <|im_start|>assistant\n  {%- endif %}\n\nend\n",
    "loop": "{% for m in messages recursive %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% else %}none"
    "{% endfor %}",
    "block": "{% block a %}x{% endblock %}{{ self.a() }}{% filter upper %}y{% endfilter %}{{ 7 // 2 }}{{ 2 ** 5 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_does(name):
    from oracles import transformers

    (expected,), _ = transformers.utils.chat_template_utils.render_jinja_template(
        [CHAT], chat_template=TEMPLATES[name], add_generation_prompt=True, **TOKENS
    )
    assert render(TEMPLATES[name], CHAT, TOKENS, add_generation_prompt=True) == expected


def test_the_date_and_refusals_of_a_template():
    assert render("{{ strftime_now('%Y') }}", [], {}) == str(time.localtime().tm_year)
    with pytest.raises(ValueError, match="the chat template failed: TemplateError: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [], {})
    with pytest.raises(ValueError, match="the chat template failed: TemplateSyntaxError"):
        render("{% if %}", [], {})
    assert render("{{ messages[0].content.__class__ }}", CHAT, {}) == ""


HOSTILE = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 2**31 }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='aaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=2) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=1000000000) }}",
    "{{ '%1000000000d' % 1 }}{{ '%*d' % (1000000000, 1) }}",
    "{{ 10**(10**10) }}",
    "{% macro m(n) %}{{ m(n-1) if n else '' }}{{ m(n-1) if n else '' }}{% endmacro %}{{ m(60) }}",
    "{{ ('x'*100000)|replace('x', 'y'*100000) }}",
    "{{ ('x'*100000).replace('x', 'y'*100000) }}",
    "{{ range(100000)|list|join('y'*100000) }}",
    "{{ ('y'*100000).join(['']*100000) }}",
    "{{ ([0]*100000)|tojson(indent=100000) }}",
    "{{ ('\\n'*100000)|indent(10000) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ [1] * 10**9 }}",
]


def test_templates_that_want_too_much_are_errors_in_bounded_time_and_memory():
    """In a child whose memory is bounded, so that a limit that fails kills no machine."""
    script = """
import json, resource, sys, time
from omnax.data.conversations.templates import render
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for template in json.load(sys.stdin):
    began = time.monotonic()
    try:
        print(repr(render(template, [{"role": "user", "content": "x"}], {}))[:80])
    except ValueError as error:
        print("refused" if len(str(error)) < 500 else "long", round(time.monotonic() - began), template)
"""
    command = [sys.executable, "-c", script]
    child = subprocess.run(command, input=json.dumps(HOSTILE), capture_output=True, text=True, timeout=240)
    lines = child.stdout.splitlines()
    assert len(lines) == len(HOSTILE), child.stderr[-2000:]
    assert all(line.startswith("refused") and int(line.split()[1]) < 30 for line in lines), lines


def test_which_template_is_found():
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    own = {"tokenizer_config.json": {"chat_template": named}}
    assert read_template({}, "ours") == "ours"
    assert read_template(own, "ours") == "d" and read_template(own, "ours", "tool_use") == "t"
    legacy = own | {"chat_template.json": {"chat_template": "legacy"}}
    assert read_template(legacy, "ours") == "legacy"
    files = legacy | {"chat_template.jinja": b"file", "additional_chat_templates/rag.jinja": b"rag"}
    assert read_template(files, "ours") == "file" and read_template(files, "ours", "rag") == "rag"
    with pytest.raises(ValueError, match=r"no chat template 'rags', but \['default', 'rag'\]"):
        read_template(files, "ours", "rags")
    with pytest.raises(ValueError, match=r"no chat template 'default', but \['x'\]"):
        read_template({"tokenizer_config.json": {"chat_template": {"x": "y"}}}, "ours")


def test_special_tokens_of_the_files():
    assert special_tokens({}) == dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": {"content": "<|im_end|>"}, "unk_token": None, "x": 1}
    assert special_tokens({"tokenizer_config.json": config}) == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    fast = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}}
    assert special_tokens(fast | {"special_tokens_map.json": {"bos_token": "<a>", "sep_token": "</s>"}}) == {
        "bos_token": "<s>",
        "sep_token": "</s>",
    }
