"""What a document becomes: its tokens, the bytes they stand for, what is learnt, and the rows it is laid into."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cluster.errors import CorpusError, ModelError
from cluster.pretrained import load_tokenizer
from cluster.storage import open_storage
from jobs.config import DataConfig
from jobs.prepare import CHAT_TEMPLATE, SPECIAL_TOKENS
from jobs.preparing.documents import content, document_hash, document_reader
from jobs.preparing.duplicates import find_duplicates, write_hashes
from jobs.preparing.encoding import Encoder, Example, bytes_per_token, encoding_fingerprint
from jobs.preparing.rows import ROW_GROUP, RowWriter
from tests import tiny

TEXT = "".join(tiny.sentences(300))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def config(**data):
    return DataConfig(sources=["x"], **data)


def chat_tokenizer(template=CHAT_TEMPLATE):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[0])
    made.chat_template = template
    return made


def pieces_tokenizer(normalizer=None):
    """A tokenizer as SentencePiece's: a sign before every text, and no table of bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


# --- tokens and bytes -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=5)
)
def test_encoder_bytes_add_up_and_ids_are_the_tokenizers(tokenizer, texts):
    for text, example in zip(texts, Encoder(tokenizer, config()).encode(texts, ""), strict=True):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert example.token_ids.tolist() == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
        assert example.byte_ends[-1] - example.byte_ends[0] == len(text.encode())
        assert np.diff(example.byte_ends)[-1] == 0


def test_encoder_table_of_bytes_says_what_offsets_say(tokenizer):
    table = bytes_per_token(tokenizer)
    plain = "".join(character for character in TEXT if character.isascii())
    encoded = tokenizer(plain, return_offsets_mapping=True)
    assert table[encoded["input_ids"]].tolist() == [stop - start for start, stop in encoded["offset_mapping"]]
    assert table[tokenizer(TEXT)["input_ids"]].sum() == len(TEXT.encode()) > len(TEXT)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC(), normalizers.Lowercase()])
def test_encoder_without_a_table_counts_the_bytes_of_the_text_as_given(normalizer):
    made = pieces_tokenizer(normalizer)
    assert bytes_per_token(made) is None
    texts = ["the cat sees der Bär", "ﬁne GRÜN"]
    for text, example in zip(texts, Encoder(made, config()).encode(texts, ""), strict=True):
        assert example.byte_ends[-1] - example.byte_ends[0] == len(text.encode())


def test_encoder_goes_by_offsets_where_the_table_is_wrong(tmp_path):
    made = load_tokenizer(str(tiny.tokenizer(tmp_path)))
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert bytes_per_token(made) is not None
    cut, whole = Encoder(made, config()).encode(["the cat x sees x", "the cat"], "")
    assert cut.byte_ends[-1] == len("the cat x sees ")  # up to the end of the last token
    assert whole.byte_ends[-1] - whole.byte_ends[0] == len("the cat")


def test_encoder_fingerprint_changes_with_the_chat_template_and_the_rules(tmp_path):
    first = load_tokenizer(str(tiny.tokenizer(tmp_path / "a")))
    same = load_tokenizer(str(tiny.tokenizer(tmp_path / "a")))
    assert encoding_fingerprint(first) == encoding_fingerprint(same)
    same.chat_template = "{{ messages }}"
    other = load_tokenizer(str(tiny.tokenizer(tmp_path / "a")))
    other.backend_tokenizer.normalizer = normalizers.NFC()
    assert len({encoding_fingerprint(item) for item in (first, same, other)}) == 3


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chat_tokenizer, pieces_tokenizer])
def test_prompt_is_context_and_the_completion_is_learnt(make):
    made = make()
    pairs = [("the cat", " sees the river."), ("", "nothing"), ("der Bär", " follows 一只鸟")]
    for (_, completion), example in zip(
        pairs, Encoder(made, config(format="prompt_completion")).encode(pairs, ""), strict=True
    ):
        learnt = example.token_ids[example.loss_mask == 1]
        assert learnt[-1] == made.eos_token_id
        assert example.loss_mask[0] == 0
        assert made.decode(learnt[:-1]).strip() == completion.strip()
        assert example.byte_ends[-1] == len(completion.encode())


def test_prompt_without_an_answer_is_left_out_and_a_missing_one_is_refused():
    asked = config(format="prompt_completion")
    assert document_reader(asked)({"prompt": "a", "completion": " "}) is None
    assert document_reader(asked)({"prompt": "", "completion": "b"}) == ("", "b")
    with pytest.raises(CorpusError, match=r"has no text in 'completion' \(found: prompt\); set data.completion_column"):
        document_reader(asked)({"prompt": "a"})


# --- chats ------------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "der Bär sees it."},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "the cat"},
]
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_chat_learns_the_assistants_words_and_the_ends_of_its_turns(template):
    made = chat_tokenizer(template)
    [example] = Encoder(made, config(format="messages")).encode([CHAT], "here")
    assert made.decode(example.token_ids) == made.apply_chat_template(CHAT, tokenize=False)
    assert made.decode(example.token_ids[example.loss_mask == 1]) == "der Bär sees it.<|im_end|>the cat<|im_end|>"
    assert example.byte_ends[-1] == len("der Bär sees it.the cat".encode())


def test_chat_mask_is_that_of_transformers_where_the_template_is_marked():
    made = chat_tokenizer(MARKED)
    theirs = made.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    [example] = Encoder(made, config(format="messages")).encode([CHAT], "here")
    assert example.token_ids.tolist() == theirs["input_ids"]
    assert example.loss_mask.tolist() == theirs["assistant_masks"]


def test_chat_template_that_rewrites_what_came_before_is_refused():
    is_old = "message['role'] == 'assistant' and not loop.last"
    forgetful = CHAT_TEMPLATE.replace("message['content']", f"('gone' if {is_old} else message['content'])")
    encoder = Encoder(chat_tokenizer(forgetful), config(format="messages"))
    assert encoder.encode([CHAT[1:3]], "here")[0].loss_mask.sum() > 1
    with pytest.raises(CorpusError, match=r"here: the chat template gives message 3 .* put {% generation %} marks"):
        encoder.encode([CHAT], "here")


def test_chat_that_begins_with_the_assistant_or_breaks_the_template_is_refused():
    encoder = Encoder(chat_tokenizer(), config(format="messages"))
    with pytest.raises(CorpusError, match="message 1 of a chat"):
        encoder.encode([[{"role": "assistant", "content": "a"}]], "here")
    strict = Encoder(chat_tokenizer("{{ raise_exception('no ' + messages[0]['role']) }}"), config(format="messages"))
    with pytest.raises(CorpusError, match=r"here: the chat template refuses a chat \(no system\)"):
        strict.encode([CHAT], "here")


def test_chat_with_a_control_token_in_a_message_is_refused():
    bad = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(CorpusError, match=r"here: a message holds '<\|im_end\|>'"):
        Encoder(chat_tokenizer(), config(format="messages")).encode([bad], "here")


def test_chat_needs_a_template_and_messages():
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(chat_tokenizer(None), config(format="messages"))
    asked = config(format="messages")
    assert document_reader(asked)({"messages": CHAT[:2]}) is None
    for wrong in ("text", [{"role": "user"}], ["a"], None):
        with pytest.raises(CorpusError, match="has no list of messages"):
            document_reader(asked)({"messages": wrong})


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(examples, **data):
    """All rows as dicts, and the writer."""
    stored = {}
    writer = RowWriter("train", config(**data), stored.__setitem__)
    for example in examples:
        writer.add(example)
    writer.close()
    tables = [pq.read_table(io.BytesIO(stored[shard["key"]])) for shard in writer.shards]
    return [row for table in tables for row in table.to_pylist()], writer, stored


def example(length, mask=None):
    return Example(
        np.arange(length, dtype=np.int32), np.arange(length), None if mask is None else np.array(mask, np.int8)
    )


def test_rows_without_packing_hold_one_document_each_and_cuts_are_counted():
    rows, writer, _ = rows_of([example(5), example(30), example(8)], packing=False, sequence_length=8)
    assert [row["token_ids"] for row in rows] == [list(range(5)), list(range(8)), list(range(8))]
    assert [row["num_bytes"] for row in rows] == [4, 7, 7]
    assert (writer.counts["cut"], writer.counts["rows"], writer.counts["tokens"]) == (1, 3, 21)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_in_which_nothing_is_learnt_are_left_out_and_counted(packing):
    # Packed, its first row has no target; cut, all of it has none.
    late = example(15, [0] * 12 + [1, 1, 1])
    rows, writer, _ = rows_of([late, example(3, [1, 0, 0])], packing=packing, sequence_length=8)
    assert [sum(row["loss_mask"]) for row in rows] == ([3] if packing else [])
    assert writer.counts["without_target"] == 2
    assert writer.counts["rows"] == len(rows)


def test_rows_masks_follow_their_tokens_through_packing():
    rng = np.random.default_rng(0)
    examples, expected = [], []
    for _ in range(200):
        length = int(rng.integers(2, 40))
        mask = rng.integers(0, 2, length)
        ids = rng.integers(0, 1000, length).astype(np.int32)
        examples.append(Example(ids, np.cumsum(mask * 3), mask.astype(np.int8)))
        expected += [int(token) for token, counts in zip(ids[1:], mask[1:], strict=True) if counts]
    rows, writer, _ = rows_of(examples, sequence_length=24)
    learnt, num_bytes = [], 0
    for row in rows:
        starts = set(np.cumsum([0, *row["segment_lengths"]]).tolist())
        pairs = enumerate(zip(row["token_ids"], row["loss_mask"], strict=True))
        mine = [token for place, (token, counts) in pairs if counts and place not in starts]
        assert row["num_bytes"] == 3 * len(mine)
        learnt += mine
        num_bytes += row["num_bytes"]
    assert learnt == expected
    assert num_bytes == writer.counts["bytes"] == 3 * len(expected)


def test_rows_are_written_in_groups_with_checksums_and_keys_of_their_content():
    rows, writer, stored = rows_of([example(20)] * 150, sequence_length=20, rows_per_shard=100, packing=False)
    assert len(rows) == 150
    assert [shard["rows"] for shard in writer.shards] == [100, 50]
    file = pq.ParquetFile(io.BytesIO(stored[writer.shards[0]["key"]]))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [ROW_GROUP, 36]
    data = bytearray(stored[writer.shards[0]["key"]])
    data[60] ^= 1
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(io.BytesIO(bytes(data)), page_checksum_verification=True)
    again = rows_of([example(20)] * 150, sequence_length=20, rows_per_shard=100, packing=False)[1]
    assert again.shards == writer.shards
    assert 0 < writer.shards[0]["number"] < 2**53


# --- duplicates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1 << 24, 50, 7])
def test_duplicates_are_found_in_source_order_for_any_amount_at_once(tmp_path, at_once):
    rng = np.random.default_rng(0)
    storage = open_storage(str(tmp_path))
    objects = [[json.dumps(int(number)) for number in rng.integers(0, 120, count)] for count in (80, 0, 90, 40)]
    seen, expected = set(), []
    for place, texts in enumerate(objects):
        write_hashes(storage, f"{place}.parquet", b"".join(document_hash(content(text)) for text in texts))
        expected.append([number for number, text in enumerate(texts) if text in seen or seen.add(text)])
    found = find_duplicates(storage, [f"{place}.parquet" for place in range(len(objects))], at_once)
    assert [item.tolist() for item in found] == expected


def test_duplicates_of_pairs_and_chats_are_told_by_all_their_parts():
    assert content(("ab", "c")) != content(("a", "bc"))
    assert content(CHAT) == content([dict(reversed(item.items())) for item in CHAT])
    assert content(CHAT) != content(CHAT[:-1])


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prompt_column": "q"}, "prompt_column=q is read only with format=prompt_completion; found format=text"),
        (
            {"format": "messages", "text_column": "t"},
            "text_column=t is read only with format=text; found format=messages",
        ),
        ({"format": "prompt_completion", "prompt_column": "completion"}, "are both completion; name two columns"),
        ({"text_column": ""}, "text_column is empty"),
        ({"sources": [], "gather": "python_docs", "format": "messages"}, "gather=python_docs makes texts"),
    ],
)
def test_config_refuses_columns_that_do_not_fit_the_format(data, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**{"sources": ["x"], **data})
