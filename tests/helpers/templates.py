"""Tiny chat templates with the logic of widely used ones, in our own words. `TEMPLATES` lists them by name."""

from __future__ import annotations

GO = "{% if add_generation_prompt %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"

CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + GO + "{{ '<|im_start|>assistant\\n' }}{% endif %}"

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}" + GO + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}" + ALTERNATE +
    "{% if loop.index0 == 0 and sys %}{% set content = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip

# The system text stands before the last question, so earlier turns change when others follow.
MISTRAL_LAST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (sys if m == users[-1] else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' %}{{ (bos_token if loop.index0 == 0 else '') + content }}{% endfor %}"
    + GO + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)  # fmt: skip

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    + GO + "{{ '<start_of_turn>model\\n' }}{% endif %}"
)  # fmt: skip

PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    + GO + "{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    + GO + "{{ '<|assistant|>\\n' }}{% endif %}"
)  # fmt: skip

COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'system': "
    "'<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m['role']] + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}" + GO + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)  # fmt: skip

# Thoughts: an empty one stands before the last answer, none before earlier ones; the prompt does not open it.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'] %}"
    "{% set why = '' %}{% if m['reasoning_content'] is string %}{% set why = m['reasoning_content'] %}"
    "{% elif '</think>' in said %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + why + '\\n</think>\\n\\n' }}{% endif %}{{ said + '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + GO + "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)  # fmt: skip

# The prompt opens the thought, and the last finished answer holds it.
QWEN_THINKS = QWEN3.replace(
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\\n<think>\\n' }}",
)

# The prompt opens a thought, and finished answers leave it out.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
    "{{ '<|User|>' + m['content'] }}{% else %}{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + said + eos_token }}{% endif %}{% endfor %}"
    + GO + "{{ '<|Assistant|><think>\\n' }}{% endif %}"
)  # fmt: skip

# An answer is a message of a channel, as in gpt-oss.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}{{ '<|channel|>final<|message|>' + "
    "m['content'] + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}"
    "{% else %}{{ '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    + GO + "{{ '<|start|>assistant' }}{% endif %}"
)  # fmt: skip

# Calls as objects in tags, results as turns of the user.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' "
    "+ m['content'] + "
    "'</tool_response><|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] %}{{ m['content'] }}"
    "{% endif %}{% for c in m['tool_calls'] %}{% set f = c['function'] %}{{ '<tool_call>\\n{\"name\": \"' + f['name'] + "
    "'\", \"arguments\": ' + f['arguments'] | tojson + '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
    + GO + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # fmt: skip

# Arguments are joined as text, and the content is always read.
TOOLS_TEXT = TOOLS.replace("f['arguments'] | tojson", "f['arguments']").replace(
    "{% if m['content'] %}{{ m['content'] }}{% endif %}", "{{ m['content'] + '' }}"
)

# Templates whose prompt in use is no beginning of the finished conversation, or that end no answer by themselves.

# The prompt closes an empty thought, which the finished turn leaves out.
CLOSED = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif")

# The system text and the tools stand before a question that is the last turn, and tools may only follow calls.
LAST_ONLY = (
    "{{ bos_token }}{% set ns = namespace(calls=false, last=0) %}"
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (sys if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{% if not ns.calls %}{{ raise_exception('a result follows no call') }}{% endif %}"
    "{{ '[RESULT]' + m['content'] + '[/RESULT]' }}{% set ns.calls = false %}"
    "{% elif m['tool_calls'] %}{% set ns.calls = true %}{{ '[CALLS]' + m['tool_calls'] | tojson + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

# The next turn's opening ends an answer, as in GLM.
NO_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}"
    + GO
    + "{{ '<|assistant|>\\n' }}{% endif %}"
)

# The end token stands after the last turn only.
ONE_END = NO_END.replace("{% else %}", "").replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")

# Contents are lists of parts.
PARTS = CHATML.replace(
    "m['content']", "(m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)

# The turn of an answer begins with other white space or other words than the prompt ends in.
OTHER_HEAD = {
    "lines": "{% for m in messages %}{{ ('\\n# Bot:\\n' if m['role'] == 'assistant' else '# Me:\\n') }}"
    "{{ m['content'] + eos_token }}"
    "{% endfor %}" + GO + "{{ '# Bot:\\n' }}{% endif %}",
    "words": "{% for m in messages %}{{ 'From: ' + m['role'] + '\\n\\n' + m['content'] + eos_token }}{% endfor %}"
    + GO + "{{ 'From: assistant\\nTo: user\\n\\n' }}{% endif %}",
    "space": "{% for m in messages %}{{ m['role'] + ':' + ('\\t\\t' if m['role'] == 'assistant' else '') }}"
    "{{ m['content'] + eos_token }}"
    "{% endfor %}" + GO + "{{ 'assistant:\\n' }}{% endif %}",
}  # fmt: skip

# A text of the system stands at the end of every conversation, and nothing ends a call, as in Command-R+. Tools must be given.
LAST_WORD = (
    "{{ bos_token }}{% for t in tools %}{{ t['function']['name'] }}{% endfor %}{% for m in messages %}"
    "{{ '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'tool': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}"
    "[m['role']] }}{% for c in m['tool_calls'] %}{{ 'Action: ' + c['function']['name'] + '\\n' }}{% endfor %}"
    "{% if not m['tool_calls'] %}{{ m['content'] + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Write an action.<|END_OF_TURN_TOKEN|>' }}"
    + GO + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)  # fmt: skip

# Nothing asks for an answer after an answer, so the model writes the beginning of its turn. It may begin with another's end.
AFTER_USER = CHATML.replace(GO, "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}")
BETWEEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Content and call are two messages, each with the end token.
TWO_MESSAGES = CHATML.replace(
    "<|im_end|>' + '\\n' }}",
    "<|im_end|>\\n' }}{% for c in m['tool_calls'] %}{{ 'call\\n' + c['function']['name'] + '<|im_end|>\\n' }}{% endfor %}",
).replace("{% for m", "{{ tools | string }}{% for m", 1)

# What a turn says stands after the results of its calls, as in Gemma 4.
SAID_AFTER = (
    "{{ tools | string }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\\n' + m['content'] }}"
    "{{ '<|im_end|>' }}{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] }}{% endfor %}{% if m['tool_calls'] and not loop.last %}"
    "{{ '=' + messages[loop.index]['content'] + ' ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}" + GO + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The time of day is written.
CLOCK = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}" + CHATML

# The prompt opens a thought, and a finished answer without one has an empty one.
EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{{ '<think>' + "
    "(m['reasoning_content'] or '') + '</think>' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    + GO + "{{ '<|assistant|><think>\\n' }}{% endif %}"
)  # fmt: skip

# Two tokens end an answer, and an empty thought opens one.
TWO_ENDS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{% if m['role'] == 'assistant' %}{{ "
    "'<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' }}{% else %}{{ '<|USER_TOKEN|>' + m['content'] }}"
    "{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    + GO + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>' }}{% endif %}"
)  # fmt: skip

TEMPLATES = {
    "chatml": CHATML, "default-system": DEFAULT_SYSTEM, "generation": GENERATION, "llama2": LLAMA2, "mistral": MISTRAL,
    "mistral-last": MISTRAL_LAST, "llama3": LLAMA3, "gemma": GEMMA, "phi": PHI, "zephyr": ZEPHYR, "command": COMMAND,
    "qwen3": QWEN3, "qwen-thinks": QWEN_THINKS, "channels": CHANNELS, "tools": TOOLS,
}  # fmt: skip
MARKS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|User|>",
    "<|Assistant|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_THINKING|>",
    "<|END_THINKING|>",
]
WRITTEN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added tokens that are text
