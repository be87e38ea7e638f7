"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from mosaic_core import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code):
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_plain_loop_trains():
    (code,) = (block for block in blocks("python") if "def train" in block)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    before = model[1].weight.detach().clone()
    data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(4)]
    run(code)["train"](model, data, steps=4)
    assert not torch.equal(model[1].weight, before)


def test_the_two_lines_train_with_lightning(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    (diff,) = blocks("diff")
    lines = [line for line in diff.splitlines() if not line.startswith("-")]
    code = "\n".join(line[1:] for line in lines).replace("max_epochs=30", "max_epochs=1, **quiet")

    class MyLightningModule(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 16, 3, padding=1),
                torch.nn.Conv2d(16, 16, 3, stride=2, padding=1),
                torch.nn.Flatten(),
                torch.nn.Linear(64, 3),
            )

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    dataset = torch.utils.data.TensorDataset(torch.randn(32, 3, 4, 4), torch.randint(3, (32,)))
    names = {
        "MyLightningModule": MyLightningModule,
        "data": torch.utils.data.DataLoader(dataset, batch_size=8),
        "quiet": {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
    }
    exec(compile(code, "README.md", "exec"), names)
    (callback,) = [c for c in names["trainer"].callbacks if type(c).__name__ == "MosaicCallback"]
    assert callback.run.progress.step == 4


def test_recipes_in_yaml(tmp_path, monkeypatch):
    (text,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("python") if "from_yaml" in block)
    recipe = run(code)["load"]()
    assert [a.name for a in recipe] == ["BlurPool", "MixUp", "LabelSmoothing", "EMA"]
    assert recipe == Recipe.from_yaml(text)


def test_a_registered_loss():
    (code,) = (block for block in blocks("python") if "register_loss" in block)
    assert callable(run(code)["my_loss"])


def test_ci_runs_the_command_for_the_tests():
    commands = [block.strip() for block in blocks("bash")]
    (tests,) = (command for command in commands if command.endswith("nox -s tests"))
    assert tests in (ROOT / ".ci" / "run").read_text()
    (demo,) = (command for command in commands if command.endswith("nox -s demo"))
    assert demo.replace("demo", "tests") == tests


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
