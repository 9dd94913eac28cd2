"""Pieces of chat templates that several families share."""

# placeholders of all pictures, for systems that look first
PICTURES_FIRST = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}"
    "{% endfor %}{% endfor %}"
)
# sets `text` to what a message says
TEXT = (
    "{% set text %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endset %}"
)
