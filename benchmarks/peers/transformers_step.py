"""The peer of benchmarks/step.ts: the same MGPO step by Hugging Face transformers and PyTorch on the processor.

    python3 transformers_step.py FOLDER [--threads 2]

FOLDER holds the checkpoint in Hugging Face layout, `pictures.safetensors` (`pixel_values`, patches of all distinct pictures one after
the other) and `work.json`: what each of the 64 rows was asked, how many tokens to decode, and the trajectories to train on.

It first says the versions, or `{"missing": ...}` where a package is absent. Then it answers lines of standard input by one line of
JSON each, until the end of input:
    load            reads FOLDER
    check eager     log-probs of the trajectories, how many greedy replies are the same, the norm of the gradient
    time sdpa       seconds of each phase of one whole step

What is in the peer's favour: everything is on its tensors before the clock starts, old log-probs are handed over instead of computed,
logits are made only where a reply's token is predicted, and no entropy is measured.
"""

import argparse
import json
import os
import sys
import time

# Read when torch is loaded. Waiting threads that spin take the cores of everything beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def say(message):
    print(json.dumps(message), flush=True)


try:
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
except ImportError as error:
    say({"missing": str(error)})
    sys.exit(0)


class Batch:
    """Rows of token ids with their pictures, padded on one side, as the model takes them."""

    def __init__(self, rows, pictures, image_token, pad, side):
        width = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad)
        attention = torch.zeros_like(ids)
        # Where each row begins.
        self.start = [width - len(row["ids"]) if side == "left" else 0 for row in rows]
        for b, row in enumerate(rows):
            n = len(row["ids"])
            ids[b, self.start[b] : self.start[b] + n] = torch.tensor(row["ids"])
            attention[b, self.start[b] : self.start[b] + n] = 1
        shown = [pictures[p] for row in rows for p in row["pictures"]]
        self.width = width
        self.inputs = {
            "input_ids": ids,
            "attention_mask": attention,
            # Without these, transformers gives all tokens one-dimensional positions and says nothing.
            "mm_token_type_ids": (ids == image_token).int(),
            "pixel_values": torch.cat([pixels for _, pixels in shown]),
            "image_grid_thw": torch.tensor([grid for grid, _ in shown]),
        }


class Step:
    """The work of one step."""

    def __init__(self, folder):
        with open(os.path.join(folder, "work.json")) as file:
            work = json.load(file)
        self.work = work
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        for name, parameter in self.model.named_parameters():
            if ".visual." in name or name.startswith("visual."):
                parameter.requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=work["learning_rate"],
            betas=tuple(work["betas"]),
            eps=work["eps"],
            weight_decay=work["weight_decay"],
            fused=True,
        )

        pixels = load_file(os.path.join(folder, "pictures.safetensors"))["pixel_values"]
        patches = [t * h * w for t, h, w in work["grids"]]
        pictures = list(zip(work["grids"], torch.split(pixels, patches)))
        image_token, pad = self.model.config.image_token_id, work["stop_tokens"][0]
        self.prompts = [Batch(turn["rows"], pictures, image_token, pad, "left") for turn in work["turns"]]
        self.dialogues = Batch(work["dialogues"], pictures, image_token, pad, "right")

        # One entry for each token that the policy wrote: its row, the position that predicts it, and what belongs to it.
        rows, columns, old, advantages = [], [], [], []
        for b, dialogue in enumerate(work["dialogues"]):
            for t, written in enumerate(dialogue["mask"]):
                if written:
                    rows.append(b)
                    columns.append(t - 1)
                    old.append(dialogue["logprobs"][t])
                    advantages.append(dialogue["advantage"])
        self.rows, self.columns = torch.tensor(rows), torch.tensor(columns)
        self.targets = self.dialogues.inputs["input_ids"][self.rows, self.columns + 1]
        self.old, self.advantages = torch.tensor(old), torch.tensor(advantages)
        self.never = torch.zeros(self.model.config.text_config.vocab_size)
        self.never[work["suppress_tokens"]] = -torch.inf

        # The tower's share of a step: it is run again in every phase.
        self.tower = 0.0
        self.model.model.visual.register_forward_pre_hook(lambda *_: self.add_tower(-time.perf_counter()))
        self.model.model.visual.register_forward_hook(lambda *_: self.add_tower(time.perf_counter()))

    def add_tower(self, seconds):
        self.tower += seconds

    def generate(self, turn, sample=True):
        """New tokens of all rows, `[rows, tokens]`."""
        batch, tokens = self.prompts[turn], self.work["turns"][turn]["tokens"]
        # No end token: every row decodes all tokens, and no processor is needed to forbid it.
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=self.work["stop_tokens"][0],
            suppress_tokens=self.work["suppress_tokens"],
            use_cache=True,
            **sampling,
        )
        with torch.inference_mode():
            out = self.model.generate(**batch.inputs)[:, batch.width :]
        if out.shape[1] != tokens:
            raise RuntimeError(f"turn {turn + 1} decoded {out.shape[1]} tokens, {tokens} were asked for")
        return out

    def logprobs(self):
        """ln p of every token that the policy wrote, in order."""
        hidden = self.model.model(**self.dialogues.inputs, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[self.rows, self.columns]) + self.never
        return torch.log_softmax(logits, -1).gather(1, self.targets[:, None])[:, 0]

    def update(self):
        """One optimizer step on the clipped objective, token mean; the norm of the gradient before clipping."""
        ratio = torch.exp(self.logprobs() - self.old)
        low, high = 1 - self.work["clip"], 1 + self.work["clip"]
        loss = -torch.minimum(ratio * self.advantages, ratio.clamp(low, high) * self.advantages).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.work["max_grad_norm"], foreach=True)
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def check(self):
        """Is this the work that was handed over? Also the warm-up."""
        with torch.inference_mode():
            difference = (self.logprobs() - self.old).abs().max().item()
        equal = 0
        for turn, batch in enumerate(self.work["turns"]):
            greedy = self.generate(turn, sample=False).tolist()
            equal += sum(ours["greedy"] == theirs for ours, theirs in zip(batch["rows"], greedy))
            self.generate(turn)
        return {"logprob_difference": difference, "equal_greedy": equal, **self.update()}

    def time(self):
        self.tower = 0.0
        marks = [time.perf_counter()]
        for phase in (lambda: self.generate(0), lambda: self.generate(1), self.update):
            phase()
            marks.append(time.perf_counter())
        turn1, turn2, update = (b - a for a, b in zip(marks, marks[1:]))
        return {"turn1": turn1, "turn2": turn2, "update": update, "tower": self.tower}


def main():
    parser = argparse.ArgumentParser(description="The peer of benchmarks/step.ts.")
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    say({"torch": torch.__version__, "transformers": transformers.__version__})
    step = None
    for line in sys.stdin:
        command, *attention = line.split()
        if command == "load":
            step = Step(options.folder)
            say({})
            continue
        step.model.set_attn_implementation(attention[0])
        say(step.check() if command == "check" else step.time())


if __name__ == "__main__":
    main()
