"""Secrets in texts that are stored or printed: their values are replaced by ***.

    a command, URL, setting, log line --mask--> the same without passwords, tokens and keys
    the environment --mask_environment--> the same, also by the names of the variables

Masking is a safety net. It knows the usual forms; it cannot know every secret. References to
variables in commands for a shell ($TOKEN, ${TOKEN}, $(pass show x)) are not secrets and stay.

Standard library only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MASK = "***"

# ----------------------------------------------------------------------------------------- by name

# In a name without separators and in capitals: HF_TOKEN, accessKey, X-Amz-Signature.
STRONG = re.compile(
    r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|CREDS|TOKEN(?!IZ)|JWT|COOKIE|AUTHORI[SZ]ATION|BEARER|"
    r"SIGNATURE|HMAC|(?<!BY)PASS$|(API|ACCESS|PRIVATE|SIGNING|ENCRYPTION|ACCOUNT|STORAGE|MASTER|SSH|AUTH)KEY"
)
# Words that mean a secret in a variable's name or a URL's query, but much else in a text.
WEAK = {"KEY", "KEYS", "SESSION", "CERT", "PRIVATE", "DSN", "CRED", "PAT", "SALT"}
SHORT = {"AUTH", "PASS", "PWD", "SIG", "SAS", "OTP"}
# Last words of names whose values only say where or how: TOKEN_FILE, SSL_CERT_DIR.
DESCRIBES = {"FILE", "PATH", "DIR", "FOLDER", "SOCK", "HOME", "TYPE", "TTL", "COUNT", "SIZE"}
FOLDERS = {"PWD", "OLDPWD"}
HARMLESS = re.compile(r"(0|1|true|false|yes|no|on|off|none|null)?", re.IGNORECASE)
NUMBER = re.compile(r"[\d.]+")
REFERENCE = r"(?:\$[A-Z_][A-Z0-9_]*|\$\{[A-Z_][A-Z0-9_]*\}|\$\([^)]*\)|`[^`]*`)"
IS_REFERENCE = re.compile(REFERENCE)
VARIABLE = rf"""{REFERENCE}(?=[\s"'&;,)}}]|$)"""


def secret_name(name: str, *, variable: bool = True) -> bool:
    """Whether a variable, option, header or setting of this name holds a secret. variable: it is an
    environment variable or in a URL's query, where words such as KEY and SESSION mean a secret."""
    last = name.rpartition(".")[2]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).replace("-", "_").upper().split("_")
    if words[-1] in DESCRIBES or last in FOLDERS:
        return False
    if STRONG.search("".join(words)):
        return True
    return any(word in SHORT or (variable and word in WEAK) for word in words)


def _harmless(name: str, value: str) -> bool:
    """Whether the value is not the secret that the name announces: max_tokens=512, KEY=$KEY."""
    value = value.strip("\"'\\")
    if HARMLESS.fullmatch(value) or IS_REFERENCE.fullmatch(value):
        return True
    return name.upper().endswith("TOKENS") and bool(NUMBER.fullmatch(value))


# --------------------------------------------------------------------------------------- in a text

QUOTED = r""""(?:[^"\\]|\\.)*"?|'[^']*'?|\\"(?:(?!\\").)*"""
NAME = r"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)"

PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:(-----END [A-Z ]*-----)|\Z)", re.S)
HEADER = re.compile(
    r"""((?:proxy-)?authorization|(?:set-)?cookie)(\\?["']?\s*[:=]\s*\\?["']?)([^"'\n]+)""", re.I
)
WITHOUT_SECRET = re.compile(
    rf"(?:\\?\s)*(?i:bearer|basic|token)?(?:\\?\s)*(?:{REFERENCE}(?=\\|\s|$)|$)"
)
LOGIN = re.compile(r"""(://)([^\s/:@'"]{0,500}:(?!\d+(?:/|$))[^\s'"]{0,500})@""")
LOGIN_TOKEN = re.compile(r"""\b((?:https?|wss?|ftps?)://)([^\s/:@'"]+)@""")
BARE_LOGIN = re.compile(r"""(?<![\w/.+*-])([\w.+-]+):([^\s@/:'"]+)@(?!sha256:)(?=[\w\[])""")
USER = re.compile(
    r"""(?<![\w-])(-u|-U|--user|--proxy-user)(\s+|=|)"""
    r"""("[^"]*:[^"]*"|'[^']*:[^']*'|[^\s"':=]+:[^\s"']+)"""
)
USER_OPTIONS = {"-u", "-U", "--user", "--proxy-user"}
USER_REFERENCE = re.compile(rf"(?:[\w.-]*|{REFERENCE}):{REFERENCE}|\d+:\d+")
OPTION = re.compile(r"(?<![\w-])--?(?P<name>[A-Za-z][\w-]*)(?:\s+|=)")
QUERY = re.compile(r"[?&#;](?P<name>[\w.-]+)=")
ASSIGNMENT = re.compile(rf"{NAME}\s*=\s*")
# In prose, `token: a piece of text` is no secret.
PAIR = re.compile(
    rf"""{NAME}(?<!authorization)(?<!cookie)\\?["']?:(?!(?<=[^\w-]token:) [a-z]+\b)\s*""", re.I
)
SET = re.compile(r"(?:\bset\s+(?:[\w-]*\.)*|\blogin\s+\S+\s+)(?P<name>[A-Za-z][\w-]*)\s+")
TOOL = re.compile(
    r"""(\bsshpass\s+-p\s*|\blftp\s+-u\s+[^\s,]{1,99},|\bmysql(?:dump)?\s+(?:\S{1,99}\s+){0,9}?-p|"""
    r"""\bcurl\s+(?:\S{1,99}\s+){0,9}?-b\s+)(?!\$)("[^"]*"?|'[^']*'?|[^\s"']+)"""
)
SCHEME = re.compile(r"""\b(bearer)((?:\\?\s)+)([\w.~+/=-]{6,})""", re.I)
# Secrets with a form of their own: AWS, Hugging Face, GitHub, GitLab, Slack, Google, JWT ...
FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{12,}|hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|"
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl[a-z]{2,4}-[\w-]{16,}|"
    r"xox[a-z]-[\w-]{8,}|xapp-[\w-]{8,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|"
    r"sk-[\w-]{16,}|[sr]k_(?:live|test)_\w{8,}|nvapi-[\w-]{16,}|npm_[A-Za-z0-9]{20,}|"
    r"pypi-[\w-]{16,}|dckr_pat_[\w-]{16,}|hvs\.[\w-]{16,}|SG\.[\w-]{10,}\.[\w-]{10,}|"
    r"eyJ[\w=-]{10,}(?:\.[\w=-]*)*)"
)


def mask(text: str) -> str:
    """`text` with *** in place of secrets: logins in URLs, signatures and tokens in their queries,
    headers, options and assignments whose name says so, and keys of known services. Masking twice
    changes nothing more."""
    text = PEM.sub(rf"\1{MASK}\2", text)
    text = HEADER.sub(_header, text)
    text = LOGIN.sub(_login, text)
    text = LOGIN_TOKEN.sub(_login, text)
    text = BARE_LOGIN.sub(_bare_login, text)
    text = USER.sub(_user, text)
    for pattern, value, secret in NAMED:
        text = _mask_named(text, pattern, value, secret)
    text = TOOL.sub(lambda found: found[1] + _in_place_of(found[2]), text)
    text = SCHEME.sub(rf"\1\2{MASK}", text)
    return FORMS.sub(MASK, text)


def _in_place_of(value: str) -> str:
    """***, in the quotes of `value`."""
    for quote in ('\\"', '"', "'"):
        if value.startswith(quote):
            return quote + MASK + (quote if value.endswith(quote) and value != quote else "")
    return MASK


def _header(found: re.Match[str]) -> str:
    if WITHOUT_SECRET.match(found[3]):
        return found[0]
    return found[1] + found[2] + MASK


def _login(found: re.Match[str]) -> str:
    if found[2] == MASK or USER_REFERENCE.fullmatch(found[2]) or IS_REFERENCE.fullmatch(found[2]):
        return found[0]
    return f"{found[1]}{MASK}@"


def _bare_login(found: re.Match[str]) -> str:
    if USER_REFERENCE.fullmatch(f"{found[1]}:{found[2]}"):
        return found[0]
    return f"{MASK}@"


def _user(found: re.Match[str]) -> str:
    if USER_REFERENCE.fullmatch(found[3].strip("\"'")):
        return found[0]
    return found[1] + found[2] + _in_place_of(found[3])


def _variable(name: str) -> bool:
    """An assignment: capitals name a variable, and key=value is much else."""
    return secret_name(name, variable=name.isupper())


def _strong(name: str) -> bool:
    """name: value, as in headers, YAML and JSON, but also in every message."""
    last = name.rpartition(".")[2]
    return bool(STRONG.search(re.sub("[_-]", "", last).upper())) and secret_name(name)


def _option(name: str) -> bool:
    return secret_name(name, variable=False)


NAMED: tuple[tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]], ...] = (
    (OPTION, re.compile(rf"""{VARIABLE}|{QUOTED}|[^\s"'-][^\s"']*"""), _option),
    (QUERY, re.compile(rf"""{VARIABLE}|[^\s"'&#;]+"""), secret_name),
    (ASSIGNMENT, re.compile(rf"""{VARIABLE}|{QUOTED}|[^\s"'&;]+"""), _variable),
    (PAIR, re.compile(rf"""{VARIABLE}|{QUOTED}|[^\s"',;]+"""), _strong),
    (SET, re.compile(rf"{VARIABLE}|\S+"), _option),
)


def _mask_named(
    text: str, name: re.Pattern[str], value: re.Pattern[str], secret: Callable[[str], bool]
) -> str:
    """Masks the values that follow names of secrets. Other values are searched for names, too."""
    parts, end = list[str](), 0
    for found in name.finditer(text):
        if found.start() < end or not secret(found["name"]):
            continue
        given = value.match(text, found.end())
        if given and not _harmless(found["name"], given[0]):
            parts += [text[end : found.end()], _in_place_of(given[0])]
            end = given.end()
    return "".join([*parts, text[end:]])


# -------------------------------------------------------------------------------- whole structures


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, with *** in place of values whose name or content shows a secret."""
    return {
        name: MASK if secret_name(name) and not _harmless(name, value) else mask(value)
        for name, value in environment.items()
    }


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, masked; also a word after an option such as --password."""
    masked, before = list[str](), ""
    for word in arguments:
        secret = before.startswith("-") and secret_name(before.lstrip("-"), variable=False)
        login = before in USER_OPTIONS and ":" in word and not USER_REFERENCE.fullmatch(word)
        hidden = (secret and "=" not in before and not _harmless(before, word)) or login
        masked.append(MASK if hidden else mask(word))
        before = word
    return masked


def mask_values(raw: Any) -> Any:
    """Nested mappings and lists, with every text masked, keys included."""
    if isinstance(raw, str):
        return mask(raw)
    if isinstance(raw, Mapping):
        return {mask_values(key): mask_values(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [mask_values(value) for value in raw]
    return raw


class MaskingFormatter(logging.Formatter):
    """Formats log records without secrets, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))
