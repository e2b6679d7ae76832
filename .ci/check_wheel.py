"""An installed hbert at work: a model, written and read again, gives in compiled kernels what plain torch gives."""

import tempfile

import torch
from transformers import AutoModel

import hbert
import hbert_kernels as hk


def main() -> None:
    """Raises if kernels are missing or results differ."""
    torch.manual_seed(0)
    model = hbert.HBertModel(hbert.HBertConfig.v1c("tiny", vocab_size=64)).eval()
    ids, mask = torch.randint(64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder)
        with hk.use_backend("cpp"):
            ours = again(ids, mask).last_hidden_state
        with hk.use_backend("reference"):
            plain = model(ids, mask).last_hidden_state
    torch.testing.assert_close(ours, plain)
    print(f"check_wheel: {hbert.__file__}, torch {torch.__version__}: saved, loaded, the same in compiled kernels")


if __name__ == "__main__":
    main()
