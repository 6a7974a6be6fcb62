import subprocess
import sys


def test_torchvision_data_sets_and_models_import_beside_this_torch():
    """In a process of its own: an extension that was loaded before would hide a missing one."""
    script = (
        "from detector.torchvision_ops import import_torchvision;"
        "import_torchvision('datasets').CIFAR10;"
        "import_torchvision('models').resnet18(num_classes=3);"
        "import torch; torch.ops.torchvision.nms"
    )

    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
