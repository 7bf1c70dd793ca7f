from calib.store.provenance import code_sha256, made_by


def test_the_code_is_every_source_file_of_calib(tmp_path, monkeypatch):
    (tmp_path / "calib/methods").mkdir(parents=True)
    (tmp_path / "calib/methods/one.py").write_text("1")
    monkeypatch.setattr("calib.store.provenance.ROOT", tmp_path)
    before = made_by()["code"]
    (tmp_path / "calib/methods/one.py").write_text("2")
    assert made_by()["code"] != before


def test_code_is_its_names_and_contents_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "room").mkdir(parents=True)
        (tmp_path / place / "room/a.py").write_text("a = 1")
    here, there = tmp_path / "here/room", tmp_path / "there/room"
    first = code_sha256(here)
    assert code_sha256(there) == first
    assert code_sha256(here / "a.py") != code_sha256(here, here / "a.py")
    for change in (lambda: (there / "a.py").write_text("a = 2"), lambda: (there / "a.py").rename(there / "b.py")):
        before = code_sha256(there)
        change()
        assert code_sha256(there) != before
    (here / "notes.txt").write_text("no code")
    assert code_sha256(here) == first
