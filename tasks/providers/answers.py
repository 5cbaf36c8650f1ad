"""What the answers of APIs for embeddings have in common."""

import pybase64


def billed_tokens(answer: object) -> int:
    """The tokens of an answer by the provider's word; 0 where it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    for name in ("total_tokens", "prompt_tokens"):
        tokens = usage.get(name) if isinstance(usage, dict) else None
        if type(tokens) is int and tokens >= 0:
            return tokens
    return 0


def numbers_in_base64(embedding: object) -> bytes:
    """The bytes of one vector; none where it is no base64."""
    if not isinstance(embedding, str):
        return b""
    try:
        return pybase64.b64decode(embedding, validate=True)
    except ValueError:
        return b""
