"""What preparing would do, from listings and a small sample: for looking before a large corpus is started.

Nothing is written, and the storage of the run is not touched.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice
from tempfile import TemporaryDirectory

from cluster.errors import CorpusError
from cluster.pretrained import load_tokenizer
from cluster.storage import open_storage
from jobs.config import RunConfig
from jobs.corpus import Source, check_endings, find_sources, read_documents
from jobs.gather import gather_python_docs
from jobs.prepare import tokenizer_of
from jobs.preparing.documents import Document, texts_of
from jobs.preparing.encoding import Encoder
from jobs.progress import Bar

_OBJECTS = 16
_BATCHES = 4
"""Of each object in the sample, from its start."""


def estimate(config: RunConfig, bar: Bar) -> dict[str, int]:
    """Objects and bytes as listed; documents and tokens as the sample has them, scaled by stored bytes.

    Copies, and what rows of one document each would cut off, are not taken away. A tokenizer that is yet to be trained
    is trained on the sample.

    Raises:
        UserError: there is no source, or an object of the sample is damaged and `data.on_error` is `stop`.
    """
    with _sources(config, bar) as sources:
        check_endings(sources, config.data)
        documents, sampled = _sample(sources, config)
    total = sum(source.info.size_bytes for source in sources)
    out = {"objects": len(sources), "bytes": total, "sampled_bytes": sampled, "documents": 0, "tokens": 0}
    if documents:
        if config.data.train_tokenizer is not None:
            tokenizer = tokenizer_of((text for item in documents for text in texts_of(item)), config.data)
        else:
            tokenizer = load_tokenizer(*config.tokenizer_source)
        examples = Encoder(tokenizer, config.data).encode(documents, "a source")
        tokens = sum(len(example.token_ids) for example in examples if example is not None)
        out |= {"documents": len(documents) * total // sampled, "tokens": tokens * total // sampled}
    return out


@contextlib.contextmanager
def _sources(config: RunConfig, bar: Bar) -> Iterator[list[Source]]:
    """The corpus; one that is gathered is gathered into a directory that goes again."""
    if config.data.gather is None:
        yield find_sources(config.data.sources)
        return
    with TemporaryDirectory(prefix="raystill-estimate-") as directory:
        gather_python_docs(open_storage(directory), f"{config.data.gather}.jsonl", bar)
        yield find_sources([directory])


def _sample(sources: list[Source], config: RunConfig) -> tuple[list[Document], int]:
    """Documents from the starts of objects spread over the corpus, and the stored bytes that they were read from."""
    documents: list[Document] = []
    num_bytes = 0
    step = max(1, len(sources) // _OBJECTS)
    for source in sources[::step][:_OBJECTS]:
        try:
            batches = list(islice(read_documents(source, config.data), _BATCHES))
        except CorpusError:
            if config.data.on_error == "stop":
                raise
            continue
        documents += [document for batch in batches for document in batch.documents]
        num_bytes += batches[-1].position if batches else source.info.size_bytes
    return documents, num_bytes
