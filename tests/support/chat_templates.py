"""Contains the published chat templates of Gemma 1, 2 and 3 (without Gemma 3's image branch)."""

OFFICIAL_2 = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
OFFICIAL_3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
OFFICIAL = {"gemma": OFFICIAL_2, "gemma2": OFFICIAL_2, "gemma3": OFFICIAL_3}
# A template that uses everything that templates of tool-using and reasoning models use.
WITH_TOOLS = """\
{{- bos_token }}
{%- macro turn(role) -%}<start_of_turn>{{ role }}
{% endmacro -%}
{%- if tools %}{{ turn('system') }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ tools | tojson(indent=2) }}<end_of_turn>
{% endif -%}
{%- if documents %}{% for d in documents %}# {{ d.title }}: {{ d['text'] }}
{% endfor %}{% endif -%}
{%- set ns = namespace(count=0) -%}
{%- for message in messages -%}
    {%- set ns.count = ns.count + 1 -%}
    {{- turn('model' if message.role == 'assistant' else message.role) -}}
    {%- if message.name is defined %}[{{ message.name }}] {% endif -%}
    {%- if message.reasoning_content is defined and enable_thinking is defined -%}
        <think>{{ message.reasoning_content }}</think>
    {%- endif -%}
    {%- if message.content is defined and message.content is string -%}
        {% generation %}{{ message.content }}{% endgeneration %}
    {%- elif message.content is defined -%}
        {%- for part in message.content -%}
            {{ part.type }}:{% for key, value in part.items() %}{{ key }}={{ value }};{% endfor %}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        <call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>
        {%- for key, value in call.function.arguments | dictsort %} {{ key }}={{ value }}
        {%- endfor -%}
        {%- if loop.index > 3 %}{% break %}{% endif -%}
    {%- endfor -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- ns.count }}{{ guideline | default('no guideline') }}{{ dict(a=1) }}{{ '%.2f' % 1.5 }}
{%- if add_generation_prompt %}{{ turn('model') }}{% endif -%}
"""
