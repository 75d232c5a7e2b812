"""Secrets are found, masked and named; ordinary text is not changed."""

import pytest

from dtron.cluster.secrets import find_secret, is_secret_file, mask

# In two parts each, so that this file contains none.
SECRETS = [
    "hf_" + "abcdefGHIJKL0123456789xyz",
    "ghp_" + "0123456789abcdefghij0123456789abcdef",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "sk-" + "proj-0123456789abcdefghijkl",
    "glpat-" + "0123456789abcdefghij",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_tokens(secret: str) -> None:
    text = f"first line\ntoken = '{secret}'\n"
    assert find_secret(text, {}).endswith("in line 2") and secret not in find_secret(text, {})
    assert mask(text, {}) == "first line\ntoken = '***'\n"


def test_other_secrets() -> None:
    assert mask("s3://user:" + "pass1234@bucket/x", {}) == "s3://user:***@bucket/x"
    assert mask("https://0123456789abcdef0123" + "@github.com/x.git", {}) == "https://***@github.com/x.git"
    assert mask("WANDB_API_KEY=" + "0123456789abcdef0123", {}) == "WANDB_API_KEY=***"
    assert find_secret("s3://user:***@bucket/x", {}) == "", "already masked"
    assert mask("env MY_KEY=" + "abcd1234567890 X=1", {}) == "env MY_KEY=*** X=1"
    assert "private key" in find_secret("-----BEGIN RSA " + "PRIVATE KEY-----", {})


def test_the_value_of_a_variable_whose_name_looks_like_a_secret() -> None:
    environment = {"MY_TOKEN": "quite-short-and-plain", "HOME": "quite-short", "A_TOKEN": "abc", "KEY_SECRET": "/tmp"}
    assert find_secret("x\ny quite-short-and-plain", environment) == "the value of MY_TOKEN in line 2"
    assert find_secret("quite-short abc /tmp", environment) == "", "no secret's name, too short, a path"
    assert mask("quite-short-and-plain and quite-short-and-plain", environment) == "*** and ***"


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer = read_tokenizer(folder)",
        'end_token = "<|end_of_text|>"',
        "tokens_per_s=123456789.123",
        "https://github.com/owner/repository/blob/main/file.py#L10",
        "s3://bucket/folder",
        "key: str = key(None, 'help')",
        "git@github.com:owner/repository.git",
    ],
)
def test_ordinary_text(text: str) -> None:
    assert find_secret(text, {}) == "" and mask(text, {}) == text


def test_file_names() -> None:
    for name in (
        ".env",
        "a/.env.local",
        ".netrc",
        "keys/id_rsa",
        "server.pem",
        "my_credentials.json",
        "hf_token",
        "token.txt",
    ):
        assert is_secret_file(name), name
    for name in ("tokenizer.json", "dtron/cluster/secrets.py", "environment.py", "configs/tokens.toml", "keys.py"):
        assert not is_secret_file(name), name
