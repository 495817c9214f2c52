"""Objects of a folder and of a real S3 server, through a proxy that breaks answers: whole, or a clear error in time."""

from __future__ import annotations

import random
import time
import traceback
from types import SimpleNamespace

import pytest

from megatron_vlrl.cli import main
from megatron_vlrl.config.checks import check
from megatron_vlrl.config.load import load as load_config
from megatron_vlrl.data import manifest as manifests
from megatron_vlrl.data import objects
from megatron_vlrl.data.loader import held_out
from megatron_vlrl.data.objects import ObjectInfo, Patience, effort, open_store, remote
from megatron_vlrl.data.objects.effort import pause_before
from megatron_vlrl.data.objects.failures import diagnose
from megatron_vlrl.data.stream import SampleStream
from megatron_vlrl.errors import ConfigError, DataError, SampleError
from tests.data_folder import make_shards
from tests.fault_proxy import Rule
from tests.s3_server import (
    KEY,
    SECRET,
    Bucket,
    faults,  # noqa: F401 - fixtures
    fresh_prefix,
    s3,  # noqa: F401
    s3_bucket,  # noqa: F401
)

pytestmark = [pytest.mark.data, pytest.mark.timeout(120)]
QUICK = Patience(connect=1, silence=0.5, budget=20, first_pause=0.01, longest_pause=0.1)
COUNTS = {"count": 9, "read": 5, "box": 6}
DATA = random.Random(0).randbytes(300_000)


def refused(call, *arguments, **named) -> str:
    """The DataError's text; nothing of it or of its traceback may hold a secret."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **named)
    assert not isinstance(caught.value, SampleError)
    shown = "".join(traceback.format_exception(caught.value))
    for secret in (KEY, SECRET, "hunter2", "a-session-token"):
        assert secret not in shown
    assert caught.value.__context__ is None
    return str(caught.value)


# ---------------------------------------------------------------- folders and names


def test_a_folder_gives_ranges_whole_files_and_sizes(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "sub").mkdir()
    store = open_store(tmp_path)
    assert store.list() == {"a.bin": ObjectInfo(300_000)}
    assert store.size_and_tag("a.bin") == ObjectInfo(300_000)
    assert store.read("a.bin", 10, 20) == DATA[10:30]
    assert store.read_all("a.bin") == DATA
    assert open_store(tmp_path / "nowhere").list() == {}


def test_a_folder_says_what_it_cannot_give(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    store = open_store(tmp_path)
    for call, words in [
        (lambda: store.read("a.bin", 1, 3), r"a\.bin gave 2 of 3 bytes from byte 1"),
        (lambda: store.read("b.bin", 0, 1), r"cannot read .*b\.bin"),
        (lambda: store.size_and_tag("b.bin"), r"cannot read .*b\.bin"),
        (open_store(tmp_path / "a.bin").list, r"cannot read folder .*a\.bin"),
    ]:
        with pytest.raises(DataError, match=words):
            call()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("ftp://host/x", "scheme ftp:// is not known; give a folder, or s3://"),
        ("s3:///x", "s3:///x names no bucket"),
        ("s3://AKIDTESTACCESSKEY0:hunter2@bucket/x", "holds credentials or a port before its first slash"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "has a query or fragment"),
    ],
)
def test_a_place_that_cannot_be_tried_is_refused_and_no_secret_repeated(where, words):
    assert words in refused(open_store, where)
    for key in ("data.train", "evaluate.data"):
        with pytest.raises(ConfigError) as error:
            check(load_config(None, [f"{key}={where}"]))
        assert f"{key}: " in str(error.value)
        assert words in str(error.value)
        assert "hunter2" not in str(error.value)


def test_places_that_can_be_tried_pass():
    check(load_config(None, ["data.train=s3://bucket/some/where", "evaluate.data=runs/a:b@c"]))


def test_pauses_double_up_to_the_longest_and_are_random():
    patience = Patience(first_pause=0.1, longest_pause=5)
    for streak, ceiling in ((0, 0.1), (1, 0.2), (4, 1.6), (6, 5), (10_000, 5)):
        pauses = [pause_before(streak, patience) for _ in range(50)]
        assert all(ceiling / 2 <= pause <= ceiling for pause in pauses)
        assert len(set(pauses)) > 40


def test_pauses_are_short_again_after_bytes_have_come(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(effort.time, "sleep", pauses.append)
    one = effort.Effort("a", Patience(first_pause=0.1, longest_pause=5))
    for _ in range(6):
        one.failed("cut")
    one.progress()
    one.failed("cut")
    assert pauses[-2] >= 1.6
    assert pauses[-1] <= 0.1


def test_waiting_leaves_the_random_state_of_the_run_alone():
    random.seed(3)
    before = random.getstate()
    pause_before(0, Patience())
    assert random.getstate() == before


STATUS = "Error performing GET http://h/b/x in 1ms - Server returned non-2xx status code: "


@pytest.mark.parametrize(
    ("text", "problem", "again", "fix"),
    [
        (STATUS + "503 Slow: <Code>SlowDown</Code>", "HTTP 503 SlowDown", True, ""),
        (STATUS + "500 Oops: ", "HTTP 500", True, ""),
        (STATUS + "429 Too Many: ", "HTTP 429", True, ""),
        (STATUS + "400 Bad: <Code>RequestTimeout</Code>", "HTTP 400 RequestTimeout", True, ""),
        (STATUS + "400 Bad: <Code>ExpiredToken</Code>", "access denied (HTTP 400 ExpiredToken)", False, "AWS_SESSION"),
        (STATUS + "401 No: ", "access denied (HTTP 401)", False, "AWS_ACCESS_KEY_ID"),
        (STATUS + "404 No: <Code>NoSuchBucket</Code>", "no such bucket", False, "check the URL"),
        (STATUS + "400 Bad: <Code>AuthorizationHeaderMalformed</Code>", "HTTP 400", False, "AWS_REGION"),
        (STATUS + "416 Range: <Code>InvalidRange</Code>", "HTTP 416 InvalidRange", False, "no such request"),
        ("Received redirect without LOCATION", "redirected", False, "AWS_REGION"),
        ("HTTP error: HttpError { kind: Timeout }", "timed out", True, ""),
        ("HTTP error: kind: Connect dns error", "host name is not found", True, ""),
        ("Generic S3 error: Missing SecretAccessKey", "could not start a request (RuntimeError)", False, "AWS_SECRET"),
        ("Error performing PUT http://169.254.169.254/latest/api/token", "no credentials", False, "AWS_PROFILE"),
    ],
)
def test_what_an_answer_means(text, problem, again, fix):
    failure = diagnose(RuntimeError(text))
    assert problem in failure.problem
    assert (failure.fix is None) == again
    assert fix in (failure.fix or "")


def test_a_machine_without_a_role_is_told_at_once_and_one_with_a_role_is_asked_again():
    obstore = pytest.importorskip("obstore", reason="obstore is not installed: pip install 'megatron-vlrl[s3]'")
    answers: list[object] = []

    def head(client, name):
        answer = answers.pop(0)
        if isinstance(answer, str):
            raise obstore.exceptions.GenericError(answer)
        return answer

    store = remote.RemoteStore("s3://b/x", None, QUICK)
    store._obstore = SimpleNamespace(head=head)
    away = "Error performing PUT http://169.254.169.254/latest/api/token: HTTP error: kind: Timeout"
    there = {"size": 5, "e_tag": '"t"'}
    answers[:] = [away]
    assert "no credentials in the environment" in refused(store.size_and_tag, "a")
    answers[:] = [there, away, there]
    assert store.size_and_tag("a") == store.size_and_tag("a") == ObjectInfo(5, "t")
    assert not answers


# ---------------------------------------------------------------- a real server


def one_object(s3: Bucket, data: bytes = DATA) -> str:  # noqa: F811
    """The URL of a fresh prefix with `a.bin` in it."""
    prefix = fresh_prefix()
    s3.put(f"{prefix}/a.bin", data)
    return f"s3://{s3.name}/{prefix}"


@pytest.mark.slow
def test_a_bucket_gives_what_a_folder_gives(s3):  # noqa: F811
    url = one_object(s3)
    s3.put(f"{url.rpartition('/')[2]}/sub/b.bin", b"b")
    store = open_store(f"{url}/")
    info = store.size_and_tag("a.bin")
    assert info.size == 300_000
    assert info.tag
    assert store.list() == {"a.bin": info}
    assert store.read("a.bin", 10, 20) == DATA[10:30]
    assert store.read("a.bin", 299_999, 1, info) == DATA[-1:]
    assert store.read_all("a.bin") == DATA
    assert open_store(f"{url}/nothing").list() == {}
    assert SECRET not in repr(store) + repr(vars(store))


@pytest.mark.slow
def test_a_long_list_comes_page_by_page(s3, monkeypatch):  # noqa: F811
    prefix = fresh_prefix()
    for number in range(7):
        s3.put(f"{prefix}/{number}", b"x" * number)
    monkeypatch.setattr(remote, "PAGE", 3)
    found = open_store(f"s3://{s3.name}/{prefix}").list()
    assert {name: info.size for name, info in found.items()} == {str(number): number for number in range(7)}


@pytest.mark.slow
def test_what_is_missing_or_too_short_fails_at_once(faults, s3):  # noqa: F811
    url = one_object(s3)
    store = open_store(url)
    for call, words in [
        (lambda: store.read("b.bin", 0, 9), f"cannot read {url}/b.bin: there is no such object (HTTP 404 NoSuchKey)"),
        (lambda: store.size_and_tag("b.bin"), f"cannot read {url}/b.bin: there is no such object"),
        (lambda: store.read("a.bin", 299_000, 2000), f"{url}/a.bin has 300000 bytes"),
        (lambda: store.read("a.bin", 400_000, 9), "HTTP 416"),
        (lambda: open_store("s3://no-such-bucket/x").read("a.bin", 0, 9), "there is no such"),
    ]:
        faults.seen.clear()
        assert words in refused(call)
        assert len(faults.seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_ACCESS_KEY_ID": "AKIDWRONG"},
        {"AWS_SECRET_ACCESS_KEY": "hunter2"},
        {"AWS_SESSION_TOKEN": "a-session-token", "AWS_SECRET_ACCESS_KEY": "hunter2"},
    ],
)
def test_wrong_keys_fail_at_once_and_are_not_repeated(faults, s3, monkeypatch, environment, caplog):  # noqa: F811
    url = one_object(s3)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(url)
    for call in (store.list, lambda: store.size_and_tag("a.bin"), lambda: store.read("a.bin", 0, 9)):
        faults.seen.clear()
        text = refused(call)
        assert "access denied (HTTP 403" in text
        assert "check AWS_ACCESS_KEY_ID" in text
        assert len(faults.seen) == 1
    assert "hunter2" not in caplog.text


@pytest.mark.slow
def test_a_store_that_repeats_what_was_signed_is_not_repeated_by_us(faults, s3, monkeypatch):  # noqa: F811
    url = one_object(s3)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token")
    faults.rules = [Rule("echo")]
    assert "HTTP 403 SignatureDoesNotMatch" in refused(open_store(url).read, "a.bin", 0, 9)


@pytest.mark.slow
def test_a_store_without_ranges_is_refused(faults, s3):  # noqa: F811
    url = one_object(s3)
    faults.rules = [Rule("whole")]
    assert "gave the whole object where a range was asked for" in refused(open_store(url).read, "a.bin", 5, 9)
    assert len(faults.seen) == 1


@pytest.mark.slow
def test_a_password_in_the_endpoint_is_not_repeated(s3, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:1")
    patience = Patience(connect=1, silence=1, budget=0.5)
    assert "connection refused" in refused(open_store("s3://b/x", patience).read, "a.bin", 0, 9)


@pytest.mark.slow
def test_half_a_key_pair_fails_at_once(s3, monkeypatch):  # noqa: F811
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = refused(open_store, "s3://b/x")
    assert text.startswith("s3://b/x cannot be opened")
    assert "AWS_SECRET_ACCESS_KEY" in text


@pytest.mark.slow
def test_keys_of_a_profile(s3, monkeypatch, tmp_path):  # noqa: F811
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'megatron-vlrl[s3]'")
    url = one_object(s3)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    keys = f"[mine]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    (tmp_path / "credentials").write_text(keys)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert open_store(url).read("a.bin", 5, 7) == DATA[5:12]
    monkeypatch.setenv("AWS_PROFILE", "yours")
    assert "AWS_PROFILE=yours gives no credentials (ProfileNotFound)" in refused(open_store, url)


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(DataError, match=r"needs obstore, which is not installed .* pip install 'megatron-vlrl\[s3\]'"):
        open_store("s3://bucket/x")


# ---------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_cut_body_is_taken_up_at_the_byte_where_it_was_cut(faults, s3):  # noqa: F811
    store = open_store(one_object(s3), QUICK)
    faults.rules = [Rule("cut", at=100_000, times=1), Rule("cut", at=50_000, times=1)]
    assert store.read("a.bin", 1000, 250_000) == DATA[1000:251_000]
    assert [seen.range for seen in faults.seen] == [f"bytes={n}-250999" for n in (1000, 101_000, 151_000)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_storm_loses_nothing_and_doubles_nothing(faults, s3, tmp_path, monkeypatch, share):  # noqa: F811
    folder = make_shards(tmp_path, COUNTS)
    url = s3.upload(folder, fresh_prefix())
    shape = {"seed": 0, "weights": {}, "rank": 0, "world": 1}
    expected = SampleStream(folder, **shape).next(60)
    monkeypatch.setattr(objects, "Patience", lambda: QUICK)
    parts = {"busy": share / 2, "cut": share / 4, "refuse": share / 4}
    # The rules are asked one after another, so each has its part of what those before it left.
    left = 1.0
    for mode, part in parts.items():
        faults.rules.append(Rule(mode, share=part / left, at=None))
        left -= part
    assert SampleStream(url, **shape).next(60) == expected
    assert [sample.position for sample in expected] == list(range(60))
    broken = [seen for seen in faults.seen if seen.mode]
    assert {seen.mode for seen in broken} == set(parts)
    assert abs(len(broken) / len(faults.seen) - share) < 0.2


@pytest.mark.slow
def test_a_storm_of_nothing_but_503_is_outlasted(faults, s3, caplog):  # noqa: F811
    patience = Patience(connect=1, silence=1, budget=20, first_pause=0.01, longest_pause=0.2, quiet=0.5)
    store = open_store(one_object(s3), patience)
    faults.rules = [Rule("busy", until=time.monotonic() + 2)]
    assert store.list().keys() == {"a.bin"}
    faults.rules = [Rule("busy", until=time.monotonic() + 2)]
    assert store.read("a.bin", 0, 1000) == DATA[:1000]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all("HTTP 503 SlowDown; trying until 20 s" in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "problem"), [("busy", "HTTP 503"), ("refuse", "connection cut"), ("stall", "timed out"), ("cut", "cut")]
)
def test_what_never_ends_is_given_up_in_time(faults, s3, mode, problem):  # noqa: F811
    url = one_object(s3)
    store = open_store(url, Patience(connect=1, silence=0.5, budget=2, first_pause=0.05, longest_pause=0.2))
    faults.rules = [Rule(mode, at=0)]
    calls = [lambda: store.read("a.bin", 0, 1000)]
    if mode in ("busy", "refuse"):
        calls += [store.list, lambda: store.size_and_tag("a.bin")]
    for call in calls:
        started = time.monotonic()
        text = refused(call)
        assert 1.5 < time.monotonic() - started < 4
        assert "gave up after" in text
        assert problem in text
        assert url in text
        assert "resume the run" in text


@pytest.mark.slow
def test_a_stall_is_cut_and_taken_up(faults, s3):  # noqa: F811
    store = open_store(one_object(s3), QUICK)
    faults.rules = [Rule("stall", at=1000, times=2)]
    started = time.monotonic()
    assert store.read("a.bin", 0, 5000) == DATA[:5000]
    assert 1 < time.monotonic() - started < 4
    assert [seen.range for seen in faults.seen] == ["bytes=0-4999", "bytes=1000-4999", "bytes=2000-4999"]


@pytest.mark.slow
def test_a_slow_body_is_waited_for_but_not_for_ever(faults, s3):  # noqa: F811
    url = one_object(s3)
    faults.rules = [Rule("slow", rate=10_000)]
    assert open_store(url, QUICK).read("a.bin", 0, 20_000) == DATA[:20_000]
    assert len(faults.seen) == 1
    started = time.monotonic()
    text = refused(open_store(url, Patience(silence=0.5, budget=1, slowest=1e6)).read, "a.bin", 0, 100_000)
    assert 0.9 < time.monotonic() - started < 3
    assert "gave up after 1 s" in text


@pytest.mark.slow
def test_another_version_of_an_object_is_never_mixed_in(faults, s3):  # noqa: F811
    url = one_object(s3)
    store = open_store(url, QUICK)
    info = store.list()["a.bin"]
    faults.rules = [Rule("cut", at=1000, times=1), Rule("tag", times=1)]
    text = refused(store.read, "a.bin", 0, 5000)
    assert "with ETag 0123456789abcdef0123456789abcdef where 300000 bytes" in text
    assert f"with ETag {info.tag} were expected" in text
    s3.put(f"{url.rpartition('/')[2]}/a.bin", DATA[::-1])
    text = refused(store.read, "a.bin", 0, 5000, info)
    assert f"{url}/a.bin has 300000 bytes with ETag" in text
    assert f"where 300000 bytes with ETag {info.tag} were expected" in text


# ---------------------------------------------------------------- shards


@pytest.mark.slow
def test_shards_in_a_bucket_are_the_shards_of_the_folder(faults, s3, tmp_path, capsys):  # noqa: F811
    folder = make_shards(tmp_path, COUNTS)
    url = s3.upload(folder, fresh_prefix())
    far = SampleStream(url, seed=3, weights={}, rank=1, world=2)
    near = SampleStream(folder, seed=3, weights={}, rank=1, world=2)
    start = [(seen.method, seen.path.rpartition("/")[2].partition("?")[0], seen.range) for seen in faults.seen]
    assert sum(method == "GET" and "train-" in name for method, name, _ in start) == 0
    faults.seen.clear()
    assert far.next(20) == near.next(20)
    assert len(faults.seen) == 10  # one request a sample
    assert far.state() == near.state()
    far.restore(near.state())
    assert held_out(url, 4) == held_out(folder, 4)
    assert main(["data", "verify", url]) == 0
    assert f"{url}: 20 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.slow
def test_shards_that_are_not_the_manifests_are_refused(s3, tmp_path):  # noqa: F811
    folder = make_shards(tmp_path, COUNTS)
    prefix = fresh_prefix()
    url = s3.upload(folder, prefix)
    stream = SampleStream(url, seed=0, weights={}, rank=0, world=1)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    for name, data in shards.items():
        s3.put(f"{prefix}/{name}", data[:-1] + b"x")  # of the same size, while a run reads
    assert "with ETag" in refused(stream.next, 1)
    assert "SHA-256 differs for train-000000.tar, train-000001.tar" in refused(manifests.verify, open_store(url))
    s3.put(f"{prefix}/train-000001.tar", shards["train-000001.tar"][:-512])
    assert "train-000001.tar has" in (text := refused(manifests.load, open_store(url)))
    assert f"says {len(shards['train-000001.tar'])} bytes; cut short?" in text
    import obstore

    obstore.delete(s3.client(), f"{prefix}/train-000001.tar")
    assert "train-000001.tar is missing, though manifest.json names it" in refused(manifests.load, open_store(url))
    assert "there is nothing at s3://" in refused(manifests.load, open_store(f"{url}-elsewhere"))
    s3.put(f"{prefix}/index.npz", (folder / "index.npz").read_bytes()[:-1] + b"x")
    s3.put(f"{prefix}/train-000001.tar", shards["train-000001.tar"])
    assert "index.npz is not the file that manifest.json describes" in refused(
        lambda: manifests.load_index(open_store(url), manifests.load(open_store(url))[0])
    )
