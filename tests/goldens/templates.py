"""Writes fixtures/templates/cases.json: chat templates in the manner of published models,
and the texts that Jinja2 makes of them with the settings and additions of transformers.

    pip install jinja2
    python templates.py

The templates are written for this file and shorter than their models: each has the
constructs that its model's template is known for.
"""

import datetime
import json
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATE = datetime.datetime(2026, 7, 4)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

PAIR = [{"role": "user", "content": "How many \"apples\" <are> left? äöü"}, {"role": "assistant", "content": "3"}]
SYSTEM = [{"role": "system", "content": " Be brief. "}, *PAIR]
LONG = [*PAIR, {"role": "user", "content": "Sure?\n"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}]
ODD = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]

LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- elif loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

MACROS = """{%- macro show(message, names=['user', 'assistant']) -%}
    {%- for name in names if name == message.role -%}
        {{ name.upper()[0] }}{{ name | capitalize }}:
        {%- continue -%}
    {%- endfor -%}
    {{ ' ' ~ message.content | replace('"', "'") }}
{%- endmacro -%}
{% set roles = messages[:1] | map(attribute='role') | list %}
{{ roles | unique | join(',') }} {{ roles | length }} {{ messages[:1] | selectattr('role', 'equalto', 'user') | list | length }}
{% for message in messages -%}
    {{ show(message) }}{{ '|' * 2 }}
    {%- for key, value in message.items() %} {{ key }}={{ value | length }}{% endfor %}
    {%- if message.role == 'assistant' %}{% generation %}[{{ message.get('name', 'none') }}]{% endgeneration %}{{ eos_token }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}A{{ 'assistant' | capitalize }}:{% endif %}"""

VALUES = """{{ {'b': 1, 'a': [true, none, 1.5, 'é"<']} | tojson }}{{ messages[0] | tojson(indent=4) }}{{ [1, {}] | tojson(separators=(',', ':'), ensure_ascii=true) }}
{{ add_generation_prompt is boolean }} {{ none }} {{ ['a', "it's"] }} {{ messages | length > 0 and not tools }} {{ 'x' is sequence }}
{%- for m in messages[:1] %} {{ loop.index }}/{{ loop.length }} {{ m.content.split()[0] | lower }}{% endfor %}
{%- if messages[-1].role == 'assistant' %}A{{ messages[-1].content }}{{ eos_token }}{% else %}A{% endif %}"""

CASES = [
    ("llama", LLAMA, PAIR),
    ("llama", LLAMA, SYSTEM),
    ("mistral", MISTRAL, PAIR),
    ("mistral", MISTRAL, SYSTEM),
    ("mistral", MISTRAL, ODD),
    ("qwen2.5", QWEN25, PAIR),
    ("qwen2.5", QWEN25, SYSTEM),
    ("qwen3", QWEN3, PAIR),
    ("qwen3", QWEN3, LONG),
    ("gemma", GEMMA, LONG),
    ("gemma", GEMMA, SYSTEM),
    ("zephyr", ZEPHYR, SYSTEM),
    ("macros", MACROS, LONG),
    ("values", VALUES, PAIR),
]


class Generation(Extension):
    """`{% generation %}` marks the assistant's text, and prints what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("inside")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def inside(caller):
        return caller()


def environment():
    """The environment of transformers' `apply_chat_template`."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = DATE.strftime
    return jinja


def render(template, messages, add_generation_prompt):
    return environment().from_string(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **SPECIAL
    )


def main():
    cases = []
    for name, template, messages in CASES:
        case = {"name": name, "template": template, "messages": messages}
        try:
            case["prompt"] = render(template, messages[:-1], True)
            case["text"] = render(template, messages, False)
        except jinja2.exceptions.TemplateError as error:
            case["error"] = str(error)
        cases.append(case)
    path = Path(__file__).resolve().parent / "fixtures/templates/cases.json"
    path.parent.mkdir(exist_ok=True)
    file = {"date": DATE.strftime("%Y-%m-%d"), "special": SPECIAL, "jinja2": jinja2.__version__, "cases": cases}
    path.write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
