"""What docs/pytorch.md says of settings by name pattern, in a loop of one's own."""

from tests.training.harness import fork


def test_megatron_gives_groups_of_name_patterns_settings_of_their_own(tmp_path):
    log = tmp_path / "log"
    failed = fork("tests.support.group_settings", 1, [], log)
    seen = {line for line in log.read_text().splitlines() if line.startswith("SEEN")}
    assert not failed, log.read_text()[-3000:]
    assert seen == {
        "SEEN 0.999 False 1 [(6, 5)]",
        "SEEN 0.999 False 1 [(7,)]",
        "SEEN 0.95 True 1 [(4, 3)]",
    }
