"""Conversations: written by the tokenizer's chat template, with labels in the assistant's turns alone."""

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tests.data.helpers import Ranks
from torchtitan_rd.__main__ import main
from torchtitan_rd.data import DatasetKeys, build_encoder, get_dataset, load_tokenizer
from torchtitan_rd.data.chat_template import ChatTemplate
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.validation import ValidationConfig, validation_keys

VOCAB = 400
SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|begin|>", "<|end|>"]

SAID = "{{ message['content'] | trim + '<|end|>\\n' }}"


def template_of(marked: bool = False, ending: bool = False, said: str = SAID) -> str:
    """marked: with generation markers around the assistant's turns. ending: with eos where a conversation
    ends, as Huginn's has. said: a message behind its header.
    """
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    text = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] in ['assistant', 'Huginn'] %}{{ '<|begin|>Huginn\\n' }}"
        + (begin + said + end)
        + "{% else %}{{ '<|begin|>' + message['role'] + '\\n' }}"
        + said
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|begin|>Huginn\\n' }}"
    )
    if ending:
        text += "{% else %}" + begin + "{{ eos_token }}" + end
    return text + "{% endif %}"


MARKED, PLAIN = template_of(marked=True), template_of()


def forgetful(kept: int) -> str:
    """Keeps of all messages but the last what stands before (0) or behind (-1) a |."""
    return template_of(
        said="{% set text = message['content'] %}{% if not loop.last %}"
        + f"{{% set text = text.split('|')[{kept}] %}}"
        + "{% endif %}{{ text + '<|end|>' }}"
    )


CONVERSATIONS = [
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": f"How many are {i} and {i}?"},
        {"role": "assistant", "content": f" They are {i + i}. "},
        {"role": "user", "content": "Sure? " * (i % 4)},
        {"role": "Huginn" if i % 2 else "assistant", "content": "Yes. " * (i % 5)},
    ]
    for i in range(40)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE whose words join, so that ids do not stand for characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for c in CONVERSATIONS for m in c), trainer)
    return tokenizer.to_str()


@pytest.fixture
def folder_with(trained, tmp_path):
    """template -> the folder of the tokenizer with it."""

    def folder_with(template: str | list[dict] | None) -> str:
        """template: several lie in tokenizer_config.json, with their names."""
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(template, list):
            config["chat_template"] = template
        (folder / "tokenizer.json").write_text(trained)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if isinstance(template, str):
            (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return folder_with


@pytest.fixture
def written(tmp_path):
    """rows -> the path of a JSONL file of them."""

    def written(rows: list[dict]) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return written


@pytest.fixture
def chats(written):
    return written([{"messages": messages} for messages in CONVERSATIONS])


def keys_of(path: str, **keys) -> DatasetKeys:
    return DatasetKeys(
        **{"dataset": "chat", "dataset_path": path, "seq_len": 32, "local_batch_size": 1, **keys}
    )


def steps_of(keys: DatasetKeys, tokenizer: str, steps: int, degree: int = 1, state=None):
    """Inputs and labels of global batches, (G, S) each, and the state after them."""
    with Ranks(keys, degree, vocab_size=VOCAB, tokenizer_path=tokenizer) as run:
        if state is not None:
            run.load(state)
        found = []
        for _ in range(steps):
            batches = [batch for loader in run.loaders for batch in loader.next_step()]
            inputs, labels = ([getattr(batch, name) for batch in batches] for name in ("inputs", "labels"))
            found.append((torch.cat(inputs), torch.cat(labels)))
        return found, run.save()


def by_transformers(folder: str, messages: list[dict], **options) -> tuple[list[int], list[int]]:
    """Ids, and labels before the shift, as transformers has them."""
    encoded = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, masks = encoded["input_ids"], encoded["assistant_masks"]
    assert any(masks), "the reference marks nothing"
    return ids, [id_ if mask else -100 for id_, mask in zip(ids, masks, strict=True)]


def test_windows_run_through_conversations_with_the_labels_that_transformers_marks(folder_with, chats):
    folder = folder_with(MARKED)
    ids, labels = [], []
    for messages in CONVERSATIONS:
        more = by_transformers(folder, messages)
        ids, labels = ids + more[0], labels + more[1]

    found, _ = steps_of(keys_of(chats), folder, 50)
    assert len(ids) > 50 * 32
    for number, (inputs, targets) in enumerate(found):
        begin = number * 33  # windows of seq_len + 1 that do not overlap
        assert inputs.tolist() == [ids[begin : begin + 32]]
        assert targets.tolist() == [labels[begin + 1 : begin + 33]]


@pytest.mark.parametrize("ending", [False, True])
def test_without_markers_a_turn_is_what_its_message_adds_to_the_prompt_for_an_answer(ending, folder_with):
    for messages in CONVERSATIONS[:8]:
        ids, labels = by_transformers(folder_with(template_of(marked=True, ending=ending)), messages)
        template = ChatTemplate.of_folder(folder_with(template_of(ending=ending)))
        found, spoken = template.encode_turns(messages, "here")
        assert found.tolist() == ids and not template.marks_turns
        assert spoken.tolist() == [label != -100 for label in labels]


def test_a_conversation_that_the_assistant_begins_needs_markers(folder_with):
    messages = [{"role": "assistant", "content": "Hi."}, *CONVERSATIONS[1][1:3]]
    with pytest.raises(DataError, match=r"here, message 0: is the assistant's, .* put {% generation %}"):
        ChatTemplate.of_folder(folder_with(PLAIN)).encode_turns(messages, "here")
    folder = folder_with(MARKED)
    ids, labels = by_transformers(folder, messages)
    found, spoken = ChatTemplate.of_folder(folder).encode_turns(messages, "here")
    assert found.tolist() == ids and spoken.tolist() == [label != -100 for label in labels]


JOINED = "{{ message['content'] + '\n' }}"


@pytest.mark.parametrize("marked", [False, True])
def test_a_token_that_joins_the_end_of_a_turn_with_what_follows_is_of_the_turn(marked, folder_with):
    """As transformers has it: the end of an answer would else be learned in the last turn alone."""
    pieces = [*pre_tokenizers.ByteLevel.alphabet(), "\u010a\u010a"]  # two line feeds in one token
    merges = [("\u010a", "\u010a")]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    header = "{{ '\n' + message['role'] + '\n' }}"
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]

    def folder(begin, end):
        answers = begin + JOINED + end
        path = folder_with(
            f"{{% for message in messages %}}{header}{{% if message['role'] == 'user' %}}{JOINED}"
            f"{{% else %}}{answers}{{% endif %}}{{% endfor %}}"
            "{% if add_generation_prompt %}{{ '\nassistant\n' }}{% endif %}"
        )
        tokenizer.save(f"{path}/tokenizer.json")
        return path

    ids, labels = by_transformers(folder("{% generation %}", "{% endgeneration %}"), messages)
    assert labels.count(len(pieces) - 1) == 1, "no token joins a turn with the next one"
    path = folder("{% generation %}", "{% endgeneration %}") if marked else folder("", "")
    found, spoken = ChatTemplate.of_folder(path).encode_turns(messages, "here")
    assert found.tolist() == ids
    assert spoken.tolist() == [label != -100 for label in labels]


@pytest.mark.parametrize("marked", [False, True])
def test_labels_do_not_depend_on_how_a_tokenizer_says_where_tokens_lie(marked, folder_with):
    """GPT-NeoX's leave spaces out of that, and transformers' mask loses all turns from such a one on."""
    folder = folder_with(template_of(marked=marked, said="{{ ' ' + message['content'] + '\n' }}"))
    expected = [ChatTemplate.of_folder(folder).encode_turns(messages, "") for messages in CONVERSATIONS[:4]]
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(f"{folder}/tokenizer.json")
    for messages, (ids, spoken) in zip(CONVERSATIONS, expected, strict=False):
        found, said = ChatTemplate.of_folder(folder).encode_turns(messages, "")
        assert found.tolist() == ids.tolist() and said.tolist() == spoken.tolist()
        assert said.sum() > 2


@pytest.mark.parametrize("kept", [0, -1])
def test_a_template_that_writes_a_beginning_otherwise_than_the_whole_is_refused(kept, folder_with):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm|b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    template = ChatTemplate.of_folder(folder_with(forgetful(kept)))
    with pytest.raises(DataError, match=r"here, message 1: the chat template writes .* put {% generation %}"):
        template.encode_turns(messages, "here")
    assert template.encode_turns(messages[:2], "here")[1].any()


def test_such_a_template_is_refused_too_where_turns_have_the_same_end_twice(folder_with):
    """Both answers read the same but for what is left out, so the missing end is that of the whole."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "|x"}] * 2
    with pytest.raises(DataError, match=r"here, message 1: the chat template writes"):
        ChatTemplate.of_folder(folder_with(forgetful(-1))).encode_turns(messages, "here")


def test_every_id_is_a_label_if_all_are_to_be_learned(folder_with, chats):
    folder = folder_with(PLAIN)
    ids = [id_ for messages in CONVERSATIONS for id_ in by_transformers(folder_with(MARKED), messages)[0]]
    for number, (inputs, labels) in enumerate(steps_of(keys_of(chats, chat_loss="all"), folder, 20)[0]):
        begin = number * 33
        assert torch.cat([inputs, labels[:, -1:]], dim=1).tolist() == [ids[begin : begin + 33]]
        assert labels[:, :-1].equal(inputs[:, 1:])


@pytest.mark.parametrize("seq_len", [45, 90], ids=["cut off", "padded"])
def test_a_conversation_that_is_a_row_is_cut_off_or_padded_as_transformers_does(seq_len, folder_with, chats):
    folder = folder_with(MARKED)
    found, _ = steps_of(keys_of(chats, pack_samples=False, seq_len=seq_len), folder, len(CONVERSATIONS))
    for messages, (inputs, labels) in zip(CONVERSATIONS, found, strict=True):
        shape = {"padding": "max_length", "truncation": True, "max_length": seq_len + 1}
        ids, marked = by_transformers(folder, messages, **shape)
        pad, eos = SPECIALS.index("<|pad|>"), SPECIALS.index("<|eos|>")
        assert labels.tolist() == [marked[1:]]
        assert inputs.tolist() == [[eos if id_ == pad else id_ for id_ in ids[:-1]]]


def test_a_question_and_its_answer_are_a_conversation_of_two_turns(folder_with, written, tmp_path):
    pairs = [(f" What is {i}? ", f"It is {i}.\n") for i in range(40)]
    columns = {"question_column": "q", "answer_column": "a"}
    folder = folder_with(PLAIN)
    path = written([{"q": q, "a": a, "other": 1} for q, a in pairs])
    found, state = steps_of(keys_of(path, **columns), folder, 20)

    messages = [
        {"messages": [{"role": "user", "content": q.strip()}, {"role": "assistant", "content": a.strip()}]}
        for q, a in pairs
    ]
    expected, _ = steps_of(keys_of(written(messages)), folder, 20)
    assert all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )
    with pytest.raises(DataError, match="some hold other data"):
        pairs[3] = (pairs[3][0], "It is four.")
        steps_of(keys_of(written([{"q": q, "a": a} for q, a in pairs]), **columns), folder, 1, state=state)


@pytest.mark.parametrize("lanes", [2, 8], ids=["whole conversations", "conversations in pieces"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_on_two_ranks_and_go_on_exactly_after_a_stop(lanes, workers, folder_with, chats):
    """Eight lanes want 16 units each of the 40 conversations, so these are cut and encoded once."""
    folder = folder_with(PLAIN)
    keys = keys_of(chats, seq_len=20, global_batch_size=lanes, shuffle_seed=1, num_workers=workers)
    expected, end = steps_of(keys.model_copy(update={"num_workers": 0}), folder, 7)
    begun, state = steps_of(keys, folder, 3, degree=2)
    continued, reached = steps_of(keys, folder, 4, degree=2 if workers else 1, state=state)
    for found, wanted in zip(begun + continued, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert reached["positions"] == end["positions"]
    ignored = torch.stack([labels for _, labels in expected]).eq(-100)
    assert ignored.any() and not ignored.all()


def test_a_stream_gives_the_same_windows_as_rows_on_disk(folder_with, chats):
    folder = folder_with(PLAIN)
    expected, _ = steps_of(keys_of(chats), folder, 6)
    found, state = steps_of(keys_of(chats, stream=True), folder, 3)
    found += steps_of(keys_of(chats, stream=True), folder, 3, state=state)[0]
    assert all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_another_template_is_another_position(folder_with, chats):
    _, state = steps_of(keys_of(chats), folder_with(PLAIN), 2)
    with pytest.raises(DataError, match="the tokenizer's content"):
        steps_of(keys_of(chats), folder_with(template_of(ending=True)), 1, state=state)


def test_other_messages_are_other_data(folder_with, written):
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    folder = folder_with(PLAIN)
    _, state = steps_of(keys_of(written(rows)), folder, 1)
    last = {"role": "Huginn", "content": CONVERSATIONS[7][-1]["content"].replace("Yes", "Nah")}
    rows[7] = {"messages": [*CONVERSATIONS[7][:-1], last]}
    with pytest.raises(DataError, match=r"among rows 7 of 40, some hold other data"):
        steps_of(keys_of(written(rows)), folder, 1, state=state)


@pytest.mark.parametrize("lanes", [2, 8], ids=["whole conversations", "conversations in pieces"])
def test_other_labels_are_another_position_and_are_never_read_from_the_cache(lanes, folder_with, chats):
    folder, keys = folder_with(PLAIN), keys_of(chats, global_batch_size=lanes)
    (*_, (_, labels)), state = steps_of(keys, folder, 3)
    for key, was, other in (("chat_loss", "'assistant'", "all"), ("pack_samples", "True", False)):
        changed = keys.model_copy(update={key: other})
        with pytest.raises(
            DataError, match=rf"{key} \(was {was}, now {other!r}\); set training\.{key} = {was}"
        ):
            steps_of(changed, folder, 1, state=state)
        (*_, (_, others)), _ = steps_of(changed, folder, 3)
        assert not others.equal(labels)


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD = {
    'message 0: has the role "human"; known: system, developer, user, assistant': [
        {"role": "human", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "message 1: has the role \"asistant\"; did you mean 'assistant'?": [
        {"role": "user", "content": "a"},
        {"role": "asistant", "content": "b"},
    ],
    "message 0 (user): has the content null; expected text": [
        {"role": "user", "content": None},
        {"role": "assistant", "content": "b"},
    ],
    "message 0: has the role null": [{"from": "human", "value": "a"}],
    "no message is the assistant's": [{"role": "user", "content": "a"}],
    "column 'messages' holds no message": [],
    "column 'messages' holds null": None,
    "the chat template cannot write it: a user must begin": [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "b"},
    ],
}


def check(tmp_path, folder, path, *arguments) -> int:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nseq_len = 4\nlocal_batch_size = 1\n")
    given = ("--training.dataset=chat", f"--training.dataset_path={path}", f"--model.tokenizer_path={folder}")
    return main(["data", "check", str(file), *given, *arguments])


def test_the_check_counts_rows_that_are_cut_off_before_what_is_learned(
    folder_with, written, tmp_path, capsys
):
    """A long prompt fills such a row. With labels in the row, or where all is learned, it is not counted."""
    long = {"messages": [{"role": "user", "content": "a " * 500}, {"role": "assistant", "content": "b"}]}
    folder, path = folder_with(PLAIN), written([GOOD, long, GOOD])
    rows = ("--training.pack_samples=false", "--training.seq_len=256")
    for more, counted in ((rows, True), (rows[1:], False), ((*rows, "--training.chat_loss=all"), False)):
        assert check(tmp_path, folder, path, *more) == 0
        printed = capsys.readouterr().out
        assert ("training: 1 conversations have no label within training.seq_len" in printed) is counted


def test_another_chat_template_at_a_resume_is_named(folder_with, chats):
    _, state = steps_of(keys_of(chats), folder_with(PLAIN), 1)
    with pytest.raises(DataError, match="the tokenizer's content or its chat template"):
        steps_of(keys_of(chats), folder_with("{# another #}" + PLAIN), 1, state=state)


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_row_is_one_line_with_its_number_in_the_check_and_in_the_run(
    problem, folder_with, written, tmp_path, capsys
):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('a user must begin') }}{% endif %}"
    folder = folder_with(strict + PLAIN)
    path = written([GOOD, GOOD, {"messages": BAD[problem]}, GOOD])
    assert check(tmp_path, folder, path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("chat: row 2") and problem in printed[0]
    assert printed[1:] == [
        f"training: 4 rows, {printed[1].split()[3]} ids; 0 empty, 0 skipped by training.skip_ranges, "
        "1 that would stop a run",
        "to leave these out: skip_ranges = [[2, 2]]",
    ]
    with pytest.raises(DataError) as error:
        steps_of(keys_of(path, global_batch_size=4, pack_samples=False), folder, 1)
    assert str(error.value) == printed[0]
    assert check(tmp_path, folder, path, "--training.skip_ranges=[[2, 2]]") == 0


def test_a_row_without_an_assistant_is_good_where_everything_is_learned(folder_with, written, tmp_path):
    path = written([GOOD, {"messages": [{"role": "user", "content": "a"}]}])
    assert check(tmp_path, folder_with(PLAIN), path, "--training.chat_loss=all") == 0


def test_fields_of_messages_reach_the_template_and_those_that_are_null_do_not(folder_with, written):
    named = "{% if message['name'] is defined %}{{ message['name'] }}{% endif %}" + SAID
    rows = [GOOD, {"messages": [{"role": "user", "content": "a", "name": "Kim"}, GOOD["messages"][1]]}]
    folder = folder_with(template_of(said=named))
    keys = keys_of(written(rows), pack_samples=False)
    texts = [load_tokenizer(folder).decode(x.flatten()) for x, _ in steps_of(keys, folder, 2)[0]]
    assert ["Kim" in text for text in texts] == [False, True] and "None" not in texts[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "has no column 'messages', only text; set training.column"),
        ([{"messages": "a"}], "column 'messages' holds string; expected lists of messages {role, content}"),
        ([{"messages": [{"from": "a", "value": "b"}]}], "expected lists of messages {role, content}"),
        ([{"messages": ["a"]}], "expected lists of messages {role, content}"),
    ],
)
def test_a_column_that_holds_no_conversations_is_refused_when_it_is_opened(
    rows, message, folder_with, tmp_path
):
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError) as error:
        steps_of(keys_of(str(tmp_path / "saved")), folder_with(PLAIN), 1)
    assert message in str(error.value)


def test_json_that_holds_no_messages_is_named_by_file_and_row(folder_with, written):
    for cell, message in (
        ("a", "row 1: column 'messages' holds \"a\"; expected a list of messages in every row"),
        (["a"], 'row 1, message 0: is "a"; expected an object with role and content'),
    ):
        with pytest.raises(DataError) as error:
            steps_of(keys_of(written([GOOD, {"messages": cell}])), folder_with(PLAIN), 1)
        assert str(error.value).endswith(f"rows.jsonl: {message}")


@pytest.mark.parametrize("first", [1, 12_000], ids=["in the first block", "in a later block"])
def test_a_message_whose_content_is_no_text_is_named_by_file_and_row(first, folder_with, written):
    """The library would make the text "3" of it beyond the first 10 MB, and quotes around all before."""
    good = {"messages": [{"role": "user", "content": "a" * 1000}, GOOD["messages"][1]]}
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}
    with pytest.raises(
        DataError, match=rf"rows\.jsonl: row {first}, message 1: has the content 3; expected text"
    ):
        steps_of(keys_of(written([good] * first + [bad])), folder_with(PLAIN), 1)


def test_answers_that_are_not_text_are_refused_with_their_row(folder_with, written):
    keys = {"question_column": "q", "answer_column": "a"}
    with pytest.raises(DataError, match=r"rows\.jsonl: row 1: column 'a' holds 4; expected text"):
        steps_of(keys_of(written([{"q": "x", "a": "y"}, {"q": "x", "a": 4}]), **keys), folder_with(PLAIN), 1)
    with pytest.raises(DataError, match=r"row 1, message 1 \(assistant\): has the content null"):
        path = written([{"q": "x", "a": "y"}, {"q": "x", "a": None}])
        steps_of(keys_of(path, global_batch_size=2, pack_samples=False, **keys), folder_with(PLAIN), 1)
    with pytest.raises(
        DataError, match=r"no column 'b', only q, a; set training\.question_column and answer"
    ):
        steps_of(
            keys_of(written([{"q": "", "a": ""}]), question_column="q", answer_column="b"),
            folder_with(PLAIN),
            1,
        )


def test_what_is_wrong_with_the_keys_or_the_tokenizer_is_found_without_the_data(folder_with, chats):
    keys = keys_of(chats)
    with pytest.raises(ConfigError, match=r"has no chat template \(chat_template\.jinja"):
        build_encoder(keys, "chat", load_tokenizer(folder_with(None)), VOCAB)
    with pytest.raises(ConfigError, match=r"conversations need the folder of a tokenizer\.json"):
        build_encoder(keys, "chat", load_tokenizer("bytes"), 258)
    several = [{"name": name, "template": MARKED} for name in ("tool_use", "rag")]
    with pytest.raises(ConfigError, match=r"several chat templates \(tool_use, rag\), none called default"):
        build_encoder(keys, "chat", load_tokenizer(folder_with(several)), VOCAB)
    # transformers takes the one called so.
    named = [{"name": "default", "template": PLAIN}, *several]
    found, alone = (ChatTemplate.of_folder(folder_with(template)) for template in (named, PLAIN))
    assert found.digest == alone.digest and not found.marks_turns
    assert found.prompt(CONVERSATIONS[0], "row") == alone.prompt(CONVERSATIONS[0], "row")
    with pytest.raises(ConfigError, match="set it to 349 or more"):
        build_encoder(keys, "chat", load_tokenizer(folder_with(PLAIN)), 300)
    for wrong, message in (
        ({"question_column": "q"}, "needs both training.question_column and training.answer_column"),
        ({"question_column": "q", "answer_column": "a", "column": "c"}, "unset training.column"),
        ({"dataset": "text", "pack_samples": False}, "is no chat: unset"),
        ({"dataset": "text", "chat_loss": "all"}, "is no chat: unset"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_dataset(keys_of(chats, **wrong))


def test_conversations_that_are_rows_must_fill_a_batch(folder_with, chats):
    with pytest.raises(DataError, match="holds 40 rows, fewer than the 41 of one global batch"):
        steps_of(keys_of(chats, pack_samples=False, global_batch_size=41), folder_with(PLAIN), 1)


def test_held_out_conversations_are_read_as_those_of_training():
    training = keys_of("rows", question_column="q", answer_column="a", chat_loss="all", pack_samples=False)
    for dataset, same in ((None, True), ("gsm8k", False)):
        keys = validation_keys(ValidationConfig(enable=True, dataset=dataset), training, 1)
        assert keys.chat_loss == "all" and not keys.pack_samples
        assert (keys.question_column, keys.answer_column) == (("q", "a") if same else (None, None))
    text = validation_keys(ValidationConfig(enable=True, dataset="pydoc"), training, 1)
    assert text.chat_loss == "assistant" and text.pack_samples
