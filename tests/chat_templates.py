"""Chat templates in the formats of well-known models, written as theirs are."""

PUBLISHED = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% "
        "endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = "
        "messages[1:] %}{% else %}{% set system = false %}{% endif %}{% for m in messages %}{% if (m['role'] =="
        " 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
        "user/assistant') }}{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = "
        "'<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] "
        "%}{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% "
        "else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
        "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content "
        "}}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' "
        "}}{% endif %}"
    ),
    "llama-3.1": (
        "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}"
        "\n{%- if not date_string is defined %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n{%- "
        "if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n{%- if tools is not none %}\n"
        "TOOLS\n{%- endif %}\n{{- 'Today Date: ' + date_string }}\n{%- for message in messages %}\n    {{- "
        "message.role + message.content | trim }}\n{%- endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
        "raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if m['role'] == "
        "'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content']"
        " + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif "
        "%}{% endfor %}"
    ),
    "mistral-v3": (
        "{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}{%- for m in"
        " messages %}{%- if m.role == 'user' %}{%- if tools is not none and (m == users[-1]) %}{{- "
        "'[AVAILABLE_TOOLS] [' }}{%- endif %}{{- '[INST] ' + m.content + '[/INST]' }}{%- else %}{{- "
        "m.content|trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported')"
        " }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
        "raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if (m['role'] == "
        "'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ "
        "'<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if "
        "add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
    ),
    "phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + "
        "message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + "
        "message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + "
        "message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        "'<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + "
        "message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ "
        "'<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "qwen2.5": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools' }}\n    {%- for tool in tools %}\n        {{- "
        "tool | tojson }}\n    {%- endfor %}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}"
        "\n        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}"
        "\n        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if (message.role == 'user') or (message.role == 'system' and "
        "not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}\n        {{- "
        "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "qwen3": (
        "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}\n{%- for message in "
        "messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if "
        "ns.multi_step and message.role == 'user' %}\n        {%- set ns.multi_step = false %}\n        {%- set"
        " ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n{%- set content "
        "= message.content %}\n{%- if '</think>' in content %}\n{%- set content = "
        "content.split('</think>')[-1].lstrip('\\n') %}\n{%- endif %}\n{{- '<|im_start|>' + message.role + "
        "'\\n' + content + '<|im_end|>\\n' }}\n{%- endfor %}\n{{- ns.last }}\n{%- if enable_thinking is defined"
        " and enable_thinking is false %}\n    {{- '<think>' }}\n{%- endif %}"
    ),
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ "
        "bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
        "message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + "
        "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + "
        "'\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% if documents %}DOCUMENTS{% endif %}{%- macro turn(role, text) %}<|START|>{{ role | "
        "upper }}{{ text | trim }}<|END|>{%- endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{% "
        "endfor %}"
    ),
    "granite": (
        "{%- if documents is none and tools is none %}{{- 'plain ' }}{%- endif %}{%- for m in messages %}{{- m "
        "| tojson(indent=2, sort_keys=true) }}{{- m.content | tojson(ensure_ascii=true) }}{{- m | "
        "tojson(separators=(',', ':')) }}{%- endfor %}"
    ),
    "smollm3": (
        "{%- set settings = dict(a=1) %}{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation"
        " -%}{{ m.content }}{{ eos_token }}{%- endgeneration -%}{%- else -%}{{ m.role }}: {{ m.content }}\n{%- "
        "endif -%}{%- endfor -%}{{ settings.a }}"
    ),
    "tulu": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}{{ "
        "'<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}{% else %}{{ message['content'] }}{% "
        "endif %}{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}{% "
        "endfor %}"
    ),
}
