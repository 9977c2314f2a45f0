"""Masking of secrets in texts, environments and command lines."""

from __future__ import annotations

import logging

import pytest

from d2v_ds.config import reference
from d2v_ds.secrets import (
    MaskingFormatter,
    mask,
    mask_arguments,
    mask_environment,
    mask_values,
    secret_name,
)

S = "s3cr3t-v4lue"
SECRETS = [
    f"https://user:{S}@host/set",
    f"https://{S}@host/set",
    f"https://user:{S}@@host:8443/set/{{}}",
    f"s3://AKID:{S}@bucket/set",
    f"postgresql://me:{S}@db:5432/x",
    f"ftp://anonymous:{S}@host/x.tar",
    f"https_proxy=http://user:{S}@proxy:3128",
    f"curl -x user:{S}@proxy:3128 https://host/x",
    f"https://host/x.tar?token={S}",
    f"https://host/x.tar?list=1&access_token={S}&x=2",
    f"https://b.s3.amazonaws.com/x?X-Amz-Credential=a%2Fb&X-Amz-Signature={S}",
    f"https://b.s3.amazonaws.com/x?AWSAccessKeyId=a&Signature={S}&Expires=1",
    f"https://storage.googleapis.com/b/x?X-Goog-Signature={S}",
    f"https://acct.blob.core.windows.net/c/x?sv=2022&se=2024&sig={S}",
    f"https://host/x?key={S}",
    f"https://host/x?api_key={S}",
    f"https://host/callback#access_token={S}",
    f"Authorization: Bearer {S}",
    f'pipe:curl -s -H "Authorization: Bearer {S}" https://host/{{}}',
    f"pipe:curl -s -H 'authorization: Basic {S}' https://host/{{}}",
    f"curl -H Authorization:\\ Bearer\\ {S} https://host/x",
    f"curl -H 'X-Api-Key: {S}' https://host/x",
    f'curl -H "PRIVATE-TOKEN: {S}" https://gitlab.host/x',
    f"curl --header 'Cookie: session={S}; theme=dark' https://host/x",
    f"curl -u user:{S} https://host/x",
    f"curl -uuser:{S} https://host/x",
    f"curl --user 'user:{S} x' https://host/x",
    f"curl --oauth2-bearer {S} https://host/x",
    f"wget --password {S} https://host/x",
    f"wget --http-password={S} https://host/x",
    f"tool --token={S} --api-key {S}",
    f"tool --secret-key '{S} with spaces'",
    f"aws configure set aws_secret_access_key {S}",
    f"machine host login me password {S}",
    f"AWS_SECRET_ACCESS_KEY={S} aws s3 cp s3://bucket/x -",
    f"env HF_TOKEN='{S} {S}' python x.py",
    f"export PGPASSWORD={S}; psql",
    f"SLURM_EXPORT_ENV=ALL,WANDB_API_KEY={S}",
    f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={S}==;EndpointSuffix=y",
    f'{{"user": "me", "password": "{S}"}}',
    f"{{'token': '{S}'}}",
    f'text: "{{\\"client_secret\\": \\"{S}\\"}}"',
    f"db_password: {S}",
    f"SSH_KEY={S}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n{S}\n-----END RSA PRIVATE KEY-----",
    f"bearer {S}",
    f"KEY={S}",
    f"pipe:sshpass -p {S} ssh host cat {{}}",
    f"pipe:lftp -u me,{S} -e x host",
    f"pipe:curl -s -b 'sid={S}' https://host/{{}}",
    f"mysqldump -u me -p{S} db",
]
FORMS = [
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "glpat-abcdefghij0123456789",
    "xoxb-123456789012-abcdefghijkl",
    "AIzaSyA-abcdefghijklmnopqrstuvwxyz01234",
    "sk-abcdefghijklmnopqrstuvwxyz0123456789",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def_ghi",
]
HARMLESS = [
    "/usr/local/bin:/usr/bin:/bin",
    "facebook/data2vec-audio-base-960h",
    "hf-internal-testing/tiny-random-Data2VecAudioModel",
    "hf_hub",
    "s3://bucket/prefix/set",
    "s3://bucket/key=abc/date=2024-01-01/x.tar",
    "gs://bucket/set/{}",
    "https://host:8443/clips-{000000..000127}.tar",
    "https://host/x.tar?versionId=3&list-type=2",
    "ssh://git@host/repo.git",
    "scp://me@host/data/set",
    "abfs://container@account.dfs.core.windows.net/set",
    "pipe:aws s3 cp s3://bucket/set/{} -",
    'pipe:curl -s -H "Authorization: Bearer $TOKEN" https://host/{}',
    "pipe:curl -s -H 'Authorization: Bearer '${TOKEN} https://host/{}",
    "pipe:curl -s -u me:$PASSWORD https://host/{}",
    "pipe:curl -s https://me:${PASSWORD}@host/{}",
    "pipe:curl -s 'https://host/{}?token='$TOKEN",
    "pipe:curl -s https://host/{}?token=$TOKEN",
    "pipe:wget -qO- --password=$(pass show host) https://host/{}",
    "batch.size=60",
    "expected key.path=value, for example optim.lr=1e-3",
    "'x': expected key=value",
    "data.shards={speech: data/train, vision: data/images/train}",
    "modality.text.max_tokens=512",
    "finetune.tokenizer=/data/tokenizer.model",
    "finetune.time_mask_with: expected one of token, zero, noise, got 'x'",
    "d2v-shards text corpus out --tokenizer t.json --text-key text --label-key label",
    "d2v-shards images corpus out --label-key=label",
    "python -u -m d2v_ds train speech_base --nproc 2",
    "docker run -u 1000:1000 nvcr.io/nvidia/pytorch:24.01-py3@sha256:0123abcd",
    "gpu[01-04,07]",
    "GPU-5d2ab0c1-1111-2222-3333-444455556666",
    "0-15,32-47",
    "a3f5c2d9e8b7a6f5c4d3e2f1a0b9c8d7e6f5a4b3",
    "SSL_CERT_FILE=/etc/ssl/cert.pem",
    "TOKENIZERS_PARALLELISM=false",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
    "resuming at step 5 from runs/first/checkpoints/00000005",
    "2024-05-01 12:30:05 INFO step 10 | loss 5.58 | 1.2 s",
    "KeyError: 'token'",
    "the tokenizer has 50265 tokens: 4 of them are special",
    "runs/exp #2",
    "mount user@host:/data /data",
    "",
]


@pytest.mark.parametrize("text", SECRETS)
def test_the_values_of_secrets_are_masked(text: str) -> None:
    masked = mask(text)
    assert S not in masked and "***" in masked
    assert mask(masked) == masked


@pytest.mark.parametrize("secret", FORMS)
def test_secrets_of_known_services_are_masked_wherever_they_are(secret: str) -> None:
    assert mask(f"error for {secret}: denied") == "error for ***: denied"
    assert mask_environment({"D2V_X": secret}) == {"D2V_X": "***"}


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_needed_to_reproduce_a_run_stays_readable(text: str) -> None:
    assert mask(text) == text


def test_the_rest_of_a_command_stays_readable() -> None:
    assert mask(f"curl -u me:{S} -H 'X-Token: {S}' https://a:{S}@host/x?sig={S}&n=1") == (
        "curl -u *** -H 'X-Token: ***' https://***@host/x?sig=***&n=1"
    )


def test_settings_with_their_defaults_stay_readable() -> None:
    settings = [s for part in reference.flatten(reference.find("")) for s in part.settings.values()]
    assert len(settings) > 150
    for setting in settings:
        for text in (f"{setting.path}={setting.default}", setting.text):
            assert mask(text) == text


@pytest.mark.parametrize(
    "name",
    "SLURM_JWT HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN D2V_COOKIE DS_SIGNATURE D2V_DSN "
    "CONDA_PRIVATE TORCH_CERT D2V_SESSION WANDB_API_KEY MYSQL_PWD PGPASSWORD GITHUBTOKEN apiKey "
    "X-Auth-Token AZURE_CLIENT_SECRET SAS SSHPASS".split(),
)
def test_variables_are_masked_by_name(name: str) -> None:
    assert secret_name(name)
    assert mask_environment({name: "plain"}) == {name: "***"}


def test_other_variables_stay() -> None:
    kept = {
        "PATH": "/usr/bin:/bin",
        "PWD": "/home/me",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1,0x2",
        "SLURM_TRES_PER_TASK": "cpu:4",
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_HOME": "/data/hf",
        "HF_TOKEN_PATH": "/data/hf/token",
        "SSL_CERT_FILE": "/etc/ssl/cert.pem",
        "TOKENIZERS_PARALLELISM": "false",
        "MAX_TOKENS": "512",
        "AWS_PROFILE": "research",
        "EMPTY_TOKEN": "",
    }
    assert mask_environment(kept) == kept
    assert mask_environment({"HF_ENDPOINT": f"https://u:{S}@host"}) == {
        "HF_ENDPOINT": "https://***@host"
    }


def test_a_word_after_an_option_is_masked() -> None:
    words = ["x", "--password", S, "-u", f"me:{S}", "--label-key", "label", f"--token={S}", "a=1"]
    assert mask_arguments(words) == [
        *("x", "--password", "***", "-u", "***", "--label-key", "label", "--token=***", "a=1")
    ]


def test_nested_values_are_masked() -> None:
    raw = {"data": {"shards": {f"speech/{FORMS[0]}": f"https://a:{S}@h"}, "n": 1}, "l": [S, None]}
    assert mask_values(raw) == {
        "data": {"shards": {"speech/***": "https://***@h"}, "n": 1},
        "l": [S, None],
    }


def test_log_lines_and_their_tracebacks_are_masked() -> None:
    try:
        raise RuntimeError(f"https://me:{S}@host failed")
    except RuntimeError as error:
        record = logging.LogRecord(
            "x", 30, __file__, 1, "token=%s", (S,), (type(error), error, error.__traceback__)
        )
    text = MaskingFormatter("%(message)s").format(record)
    assert "RuntimeError: https://***@host failed" in text and S not in text


@pytest.mark.parametrize(
    "part", ["a", "a.", "a-", "a:", "://a:", "?a", "-u ", "eyJ", "'", '"', "$(", "curl a "]
)
def test_long_texts_take_linear_time(part: str) -> None:
    """A pattern that backtracks would not end here."""
    mask(part * 20_000)
