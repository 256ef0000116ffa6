"""A CLIP's token table that its file holds cut: only the rows of the words that it knows.

`fewstep.text_encoder.token_ids` says of each row which token it is; all other tokens are zero. A
small model of a few words is then not mostly zeros: ours is 1.3 MB instead of 8.
"""

import torch
from torch import Tensor

from .layout import dense

IDS = "fewstep.text_encoder.token_ids"
TABLE = "text_model.embeddings.token_embedding.weight"
TOKENS = 49408  # of CLIP's vocabulary, all of which the host's tokenizer may ask for


def spread(path: str, state_dict: dict[str, Tensor], metadata: dict) -> None:
    """Put a whole table (TOKENS, width) float16 in place of a cut one; others stay as they are.

    Raises: ValueError for ids that are not the table's.
    """
    if IDS not in metadata:
        return
    ids, table = torch.tensor(metadata[IDS]), state_dict.get(TABLE)
    rows = None if table is None else len(table)
    if rows != len(ids) or ids.dtype != torch.int64 or ids.min() < 0 or ids.max() >= TOKENS:
        raise ValueError(
            f"{path}: {IDS} names {len(ids)} tokens for the {rows} rows of {TABLE}, or some that "
            f"CLIP does not have (0 to {TOKENS - 1}). The file was badly written: get another one."
        )
    whole = torch.zeros(TOKENS, table.shape[1], dtype=torch.float16)
    whole[ids] = dense(table).to(whole.dtype)
    state_dict[TABLE] = whole
