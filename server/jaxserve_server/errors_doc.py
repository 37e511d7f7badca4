"""The reference page of errors, `docs/errors.md`, written from the table.

`python -m jaxserve_server.errors_doc > docs/errors.md`; a test compares the file with the table.
"""

from __future__ import annotations

from jaxserve_server.errors import ErrorKind

INTRODUCTION = """\
# Errors

Every error that the server answers with, from the one table in `server/jaxserve_server/errors.py`.
This page is made from it by `python -m jaxserve_server.errors_doc > docs/errors.md`.

The body is always OpenAI's:

```json
{"error": {"message": "…", "type": "…", "param": "…", "code": "…"}}
```

`param` names the request's parameter at fault, such as `messages[0].role`, or is null. Words in braces are
filled in. A message never holds a path, an address or a traceback of the server.

An error after a stream has begun comes as its last event, `data: {"error": …}`, and no `data: [DONE]` follows.
A request that the HTTP parser itself refuses (headers above 64 KB, a malformed request line) gets a 400 in plain
text, since there is no request to answer yet.

| status | type | code | message | headers |
|---|---|---|---|---|
"""


def markdown() -> str:
    """The page, ending with a newline."""
    return INTRODUCTION + "".join(_line(kind) for kind in ErrorKind)


def _line(kind: ErrorKind) -> str:
    row = kind.value
    headers = [f"{name.title()}: {value}" for name, value in row.headers]
    if row.retry_after_s is not None:
        headers.append("Retry-After")
    if row.close:
        headers.append("Connection: close")
    code = "null" if row.code is None else f"`{row.code}`"
    message = row.template.replace("|", "\\|")
    return f"| {row.status} | `{row.type}` | {code} | {message} | {', '.join(headers)} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
