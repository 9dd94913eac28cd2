"""The HTTP API in OpenAI's form, and a page to talk with the model."""
