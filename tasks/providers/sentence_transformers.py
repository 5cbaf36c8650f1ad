"""A model of sentence-transformers, run in this process: no account, no price, no network.

The library cuts a text off at the model's longest length without a word, so its spaces say
`truncation`. Texts of about the same length are encoded together, since every text of a batch
is padded to the longest one, and padding costs as much as text.

A model is loaded when the first call is prepared, once a process for each device, backend and
precision.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tasks.errors import BatchRefused, ProviderBusy, ProviderDenied, SettingsError
from tasks.limits import Learned, Limits
from tasks.prepare import PLAIN, Preparation
from tasks.providers import Answer, Space, Vectors
from tasks.providers.loaded_model import Running, Setup, require_installed, running_model
from tasks.providers.model_folder import ModelFolder, read_model
from tasks.providers.parts import Counts, PartFailed, Positions, encode_in_parts
from tasks.tokens import TokenizerEstimate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

RECIPE = "1"
"""Names how a text becomes a vector; a change of anything below needs another one."""

CONCURRENCY = 2
"""Calls in flight: one answer is checked and written while the next one is encoded."""


@dataclass(frozen=True)
class ModelTokens:
    """Tokens of a text as the model counts them, cut off where the model cuts. It pickles.

    Attributes:
        tokenizer: The model's tokenizer.json.
        longest: Tokens after which a text is cut off; None where it never is.
        prompt: What is put before each text.
    """

    tokenizer: str
    longest: int | None = None
    prompt: str = ""

    @property
    def margin(self) -> float:
        """It is exact."""
        return 0.0

    def count(self, text: str) -> int:
        """Tokens of `text`, at least 1; raises as `counts`."""
        return int(self.counts([text])[0])

    def counts(self, texts: Sequence[str]) -> Counts:
        """The count of each of `texts`, in their order.

        Raises:
            SettingsError: The file is missing or holds no tokenizer.
        """
        whole = [self.prompt + text for text in texts] if self.prompt else texts
        counts = TokenizerEstimate(self.tokenizer, margin=0.0).counts(whole)
        return counts if self.longest is None else np.minimum(counts, np.int32(self.longest))

    @property
    def measure(self) -> str:
        """Sizes are tokens, cut off; raises as `counts`."""
        return f"{TokenizerEstimate(self.tokenizer).measure}/{self.longest}/{self.prompt}"

    def sizes(self, texts: pa.Array) -> Counts:
        """The count of each of `texts`; raises as `counts`."""
        return self.counts(texts.to_pylist())[:, None]

    def of_sizes(self, sizes: Counts) -> Counts:
        """The counts themselves."""
        return sizes[:, 0]


@dataclass(frozen=True)
class SentenceTransformers:
    """One model of sentence-transformers. A value: it pickles, and holds no weights.

    Attributes:
        model: What is known of the model without loading it.
        dimension: Length of each vector; a smaller one than the model's is cut off and made
            a unit vector again.
        limits: What may be asked of it at once; it has none a minute.
        tokenizer: The model's tokenizer.json.
        input_type: "document", "query" or None: which of the model's prompts stands before a text.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is.
        backend: "torch", "onnx" or "openvino".
        precision: "float32", "float16" or "bfloat16"; None is how the model was saved with torch,
            and float32 with another backend.
        preparation: What stands in front of the texts of its space.
    """

    model: ModelFolder
    dimension: int
    limits: Limits
    tokenizer: str
    input_type: str | None = "document"
    device: str | None = None
    backend: str = "torch"
    precision: str | None = None
    preparation: Preparation = PLAIN

    @property
    def space(self) -> Space:
        """Where its vectors live: files of the model, backend and precision make another one."""
        precision = self.precision or ("saved" if self.backend == "torch" else "float32")
        return Space(
            "sentence-transformers",
            f"{self.model.name}@{self.model.revision}",
            self.dimension,
            input_type=self.input_type,
            truncation=True,
            preparation=self.preparation.recipe(f"{RECIPE} {self.backend} {precision}"),
        )

    @property
    def least(self) -> Learned:
        """There is no account."""
        return Learned()

    @property
    def unit_vectors(self) -> bool:
        """Every vector has length 1."""
        return True

    @property
    def estimate(self) -> ModelTokens:
        """The model's own count."""
        return ModelTokens(self.tokenizer, self.model.longest, self._prompt)

    @property
    def setup(self) -> Setup:
        """What is loaded for it."""
        model = self.model
        return Setup(
            source=model.source,
            revision=model.revision if model.on_hub else None,
            digest=None if model.on_hub else model.revision,
            device=self.device,
            backend=self.backend,
            precision=self.precision,
        )

    @property
    def _prompt(self) -> str:
        if self.input_type is None:
            return ""
        query = self.input_type == "query"
        return self.model.query_prompt if query else self.model.document_prompt

    def require(self) -> None:
        """Fail early where the library, or what the backend needs, is not installed.

        Raises:
            SettingsError: What is missing, or what does not go together.
        """
        require_installed(self.setup)

    def for_queries(self) -> "SentenceTransformers":
        """The same with the model's prompt for what is searched with."""
        if self.input_type is None:
            return self
        return dataclasses.replace(self, input_type="query")

    def prepare(self) -> None:
        """Load the model and its tokenizer.

        Raises:
            SettingsError: They cannot be loaded, or device, backend and precision do not go
                together; or the model's folder is not as it was, or on a worker not as with the
                run itself.
        """
        model = self.model
        if not model.on_hub and read_model(model.source, self.backend).revision != model.revision:
            raise SettingsError(
                f"embedding.model: {model.source} holds other files here and now than when the run "
                "began. See that it stays as it is, and is the same wherever the run embeds."
            )
        self.estimate.counts([""])
        self._running()

    def embed(self, texts: Sequence[str]) -> Answer:
        """Embed `texts`; row i belongs to text i, and what is longer than the model takes is cut.

        Raises:
            BatchRefused: The model fails over some texts, or one alone is too large for the memory.
            ProviderDenied: The model cannot be loaded.
            ProviderBusy: It was told to give up.
        """
        begun = _given_up
        try:
            running = self._running()
        except SettingsError as error:
            denied = ProviderDenied(str(error))
        else:
            counts = self.estimate.counts(texts)
            vectors = np.empty((len(texts), self.dimension), dtype=np.float32)

            def encode(part: Positions) -> Vectors:
                if begun != _given_up:
                    raise ProviderBusy("The run was ended while its texts were being encoded.")
                return self._encoded(running.model, [texts[at] for at in part.tolist()])

            with running.turn:
                try:
                    encode_in_parts(counts, running.budget, encode, vectors)
                except PartFailed as failure:
                    refused = self._refused(failure)
                else:
                    return Answer(_of_length_1(vectors), range(len(texts)), int(counts.sum()))
            raise refused
        raise denied

    def give_up(self) -> None:
        """End the calls of this process after what each one is encoding just now."""
        global _given_up  # noqa: PLW0603 - it counts for the whole process
        _given_up += 1

    def _running(self) -> Running:
        found = running_model(self.setup)
        if found.dimension < self.dimension:
            raise SettingsError(
                f"embedding.dimension: {self.model.name} makes vectors of length "
                f"{found.dimension}, not {self.dimension}. Set it to {found.dimension} or less."
            )
        return found

    def _encoded(self, model: "SentenceTransformer", texts: list[str]) -> Vectors:
        encode = {"document": model.encode_document, "query": model.encode_query}
        found: Vectors = encode.get(self.input_type or "", model.encode)(
            texts,
            prompt=self._prompt,
            batch_size=len(texts),
            show_progress_bar=False,
            truncate_dim=self.dimension,
        )
        return found

    def _refused(self, failure: PartFailed) -> BatchRefused:
        if failure.out_of_memory:
            why = f"takes more memory than there is for one text of {failure.tokens:,} tokens. "
            way_out = "Cut the text shorter, or choose another embedding.device."
        else:
            why = f"fails over {len(failure.positions):,} texts ({failure}). "
            way_out = "Change the text that is to blame."
        return BatchRefused(
            f"The model {self.model.name} {why}{way_out}", positions=failure.positions.tolist()
        )


def _of_length_1(vectors: Vectors) -> Vectors:
    """`vectors` made unit vectors; what has no length stays, and is found by who checks it."""
    wide = vectors.astype(np.float64)  # squares leave float32 early
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    np.divide(wide, norms, out=wide, where=norms > 0)
    return wide.astype(np.float32)


_given_up = 0
