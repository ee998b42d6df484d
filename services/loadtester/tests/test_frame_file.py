from llmpilot_loadtester.frame_file import FrameFile


def test_frames_come_back_in_their_order_also_between_additions() -> None:
    frames = FrameFile()
    frames.append(b"a" * 100_000)
    frames.append(b"")
    assert list(frames) == [b"a" * 100_000, b""]
    frames.append(b"c")
    assert list(frames) == [b"a" * 100_000, b"", b"c"]
    frames.close()
