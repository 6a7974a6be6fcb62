import math

from attacks.campaign import Campaign
from attacks.store import ShardKey, ShardRecord
from detector.network.training import Progress
from pathguard.progress import attack_bar, training_bar


def test_a_log_gets_a_line_for_every_tenth_with_the_time_left(capsys):
    with training_bar("train") as listen:
        for step in range(1, 101):
            listen(Progress(0, step, 100, 0.5, {"accuracy": 0.75, "keep_ratio": 0.7}))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[4].startswith("train 50/100, ")
    assert lines[4].endswith(" s left, loss 0.50 acc 0.750 open 0.700")


def test_a_resumed_run_claims_neither_a_loss_nor_a_time_before_its_first_step(capsys):
    with training_bar("train") as listen:
        listen(Progress(5, 50, 100, math.nan, {"accuracy": 0.75}))
        listen(Progress(5, 60, 100, 0.5, {"accuracy": 0.75}))

    first, second = capsys.readouterr().err.splitlines()
    assert first == "train 50/100, acc 0.750"
    assert " s left, loss 0.50 acc 0.750" in second


def test_attacks_tell_how_often_the_last_shard_fooled(capsys):
    record = ShardRecord(ShardKey("test", "pgd", 0), 250, 40, "", {})
    with attack_bar("attack") as listen:
        listen(Campaign(0, 2, None))
        listen(Campaign(1, 2, record))

    assert "attack 1/2" in capsys.readouterr().err.splitlines()[-1]


def test_standard_output_stays_free(capsys):
    with training_bar("train") as listen:
        listen(Progress(0, 1, 1, 0.5, {}))

    assert capsys.readouterr().out == ""
