"""`sinuous demo genomics`: files that read back, whole or not at all, and a sentence for whatever is wrong."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

import sinuous
from sinuous.apps.cli import main
from sinuous.genomics import demo, demo_annotate, demo_molecules, demo_variants, drawing, read_features, read_molecules
from sinuous.genomics.annotation import Part
from sinuous.genomics.datasets import CLASSES

SMALL = {"dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small untrained models, by the part of the demo that they are for."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    options = {
        "annotate": ("dna_xlstm_nano", {"head": "position", "num_classes": 5, "strands": "shared"}),
        "variants": ("dna_xlstm_nano", {}),
        "protein": ("prot_xlstm_nano", {}),
        "molecules": ("chem_xlstm_nano", {}),
    }
    for part, (name, more) in options.items():
        model = sinuous.create_model(name, **SMALL, **more)
        for weights in model.parameters():
            weights.data += 0.1 * torch.randn(weights.shape)
        if part == "molecules":  # without a charge or a bond that no atom has
            with torch.no_grad():
                model.head.weight.zero_()
        card = {"pretrained_cfg": {"label_names": list(CLASSES)}} if part == "annotate" else {}
        sinuous.save(model, folder / part, card=card)
    return {part: folder / part for part in options}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sequence(length: int, seed: int = 0) -> str:
    drawn = torch.randint(4, (length,), generator=torch.Generator().manual_seed(seed))
    return "".join("ACGT"[i] for i in drawn.tolist())


GENOME = {"one": "g", "chr1": sequence(300) + 20 * "N" + sequence(100, 1).lower(), "chr2": sequence(70, 2)}


def write_genome(path: Path) -> Path:
    path.write_text("".join(f">{name} some words\n{letters}\n" for name, letters in GENOME.items()))
    return path


def told(words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a command prints to where it should: files to stdout, a sentence to stderr."""
    assert main(words.split()) == code
    printed = capsys.readouterr()
    if code:
        assert "Traceback" not in printed.err
        return printed.err
    return printed.out


@pytest.mark.parametrize("ending", ["bed", "gtf", "bedGraph"])
def test_annotations_are_written(
    ending: str, models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_genome(here / "genome.fa")
    command = f"demo genomics annotate --model {models['annotate']} --fasta genome.fa --out found/genes.{ending}"
    out = told(f"{command} --chunk 50 --figure genes.png", capsys)
    assert out.splitlines()[-2:] == [f"found/genes.{ending}", "genes.png"]
    assert Image.open("genes.png").size[0] > 1000
    features = list(read_features(f"found/genes.{ending}"))
    if ending == "bed":
        for name, letters in GENOME.items():
            own = [feature for feature in features if feature.seqid == name]
            assert [f.start for f in own] == [0, *(f.end for f in own)][: len(own)]
            assert own[-1].end == len(letters)
        assert [f[2:4] for f in features if f.kind == "gap"] == [(300, 320)]
        told(f"{command} --chunk 7", capsys)
        assert list(read_features(f"found/genes.{ending}")) == features
    assert sorted(path.name for path in here.rglob("*")) == sorted(
        ["found", "genome.fa", f"genes.{ending}", "genes.png"]
    )


def test_a_region_is_a_part_of_the_whole(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_genome(here / "genome.fa")
    command = f"demo genomics annotate --model {models['annotate']} --fasta genome.fa --out"
    told(f"{command} all.bed", capsys)
    told(f"{command} part.bed --region chr1:101-350 --figure part.png", capsys)
    part = list(read_features("part.bed"))
    assert (part[0].start, part[-1].end) == (100, 350)
    whole = [f for f in read_features("all.bed") if f.seqid == "chr1" and f.end > 100 and f.start < 350]
    assert [(max(f.start, 100), min(f.end, 350), f.kind) for f in whole] == [(f.start, f.end, f.kind) for f in part]
    told(f"{command} part.bed --region chr2:1-70", capsys)
    assert {(f.seqid, f.end <= 70) for f in read_features("part.bed")} == {("chr2", True)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("annotate --fasta genome.fa --out genes.txt", "--out must be a file that ends in .bed, .gtf or .bedGraph"),
        ("annotate --fasta genome.fa --out a.bed --figure a.bed", "--out must not be a file that is read or written"),
        ("annotate --fasta genome.fa --out a.bed --figure a.jpeg", "--figure must be a file that ends in .png"),
        ("annotate --fasta no.fa --out a.bed", "no.fa"),
        ("annotate --fasta empty.fa --out a.bed", "empty.fa"),
        ("annotate --fasta wrong.fa --out a.bed", "'chr1' at position 3"),
        ("annotate --fasta genome.fa --out a.bed --region chr1:0-10", "with 1 the first base"),
        ("annotate --fasta genome.fa --out a.bed --region chr1:20-10", "with 1 the first base"),
        ("annotate --fasta genome.fa --out a.bed --region chr1", "must be like chr1:1001-2000"),
        ("annotate --fasta genome.fa --out a.bed --region chr1:400-421", "--region must be a part of chr1, 1-420"),
        ("annotate --fasta genome.fa --out a.bed --region chrX:1-2", "'chrX'; there are one, chr1, chr2"),
        ("annotate --fasta genome.fa --out a.bed --chunk 0", "chunk must be at least 1"),
        ("variants --fasta genome.fa --out a.tsv", "--vcf is missing"),
        ("variants --fasta genome.fa --vcf wrong.vcf --out a.tsv", "chr1:2 "),
        ("variants --fasta genome.fa --vcf header.vcf --out a.tsv", "no variant to score"),
        ("variants --out a.bed", "--out must be a file that ends in .tsv or .txt"),
        ("protein --fasta protein.fa --spans 3-3 --out a.png", "must be like 10-20"),
        ("protein --fasta protein.fa --spans 3-40 --out a.png", "from 0 to 10"),
        ("protein --fasta protein.fa --spans 1-4 3-5 --out a.png", "must not overlap"),
        ("protein --fasta badprotein.fa --out a.png", "'second' at position 2"),
        ("molecules --count 0", "--count must be at least 1"),
        ("molecules --like C(( --smiles a.png", "--smiles must be a file that ends in"),
        ("nothing", "invalid choice"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    words: str, sentence: str, models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_genome(here / "genome.fa")
    (here / "empty.fa").write_text("")
    (here / "wrong.fa").write_text(">chr1\nACE\n")
    (here / "protein.fa").write_text(">first\nMKTAYIAKQR\n")
    (here / "badprotein.fa").write_text(">first\nMKTAYIAKQR\n>second\nM1\n")
    second = GENOME["chr1"][1]
    other = "A" if second != "A" else "C"
    (here / "wrong.vcf").write_text(f"##fileformat=VCFv4.2\nchr1\t2\t.\t{other}\t{second}\n")
    (here / "header.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n")
    before = sorted(path.name for path in here.iterdir())
    part = words.split()[0]
    model = f" --model {models[part]}" if part in models else ""
    printed = told(f"demo genomics {words}{model}", capsys, code=2)
    assert sentence in printed
    assert sorted(path.name for path in here.iterdir()) == before


def test_effects_of_variants_are_written(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_genome(here / "genome.fa")
    first = GENOME["chr1"][0]
    alleles = [letter for letter in "ACGT" if letter != first]
    (here / "some.vcf").write_text(f"##fileformat=VCFv4.2\nchr1\t1\t.\t{first}\t{','.join(alleles)}\n")
    out = told(
        f"demo genomics variants --model {models['variants']} --fasta genome.fa --vcf some.vcf --out a.tsv", capsys
    )
    assert out.splitlines()[-1] == "a.tsv"
    lines = [line.split("\t") for line in Path("a.tsv").read_text().splitlines()]
    assert lines[0] == ["name", "position", "ref", "alt", "effect"]
    assert [line[:4] for line in lines[1:]] == [["chr1", "1", first, alt] for alt in alleles]
    model = sinuous.load(models["variants"])
    effects = sinuous.genomics.variant_effects(model, GENOME, [("chr1", 1, first, alt) for alt in alleles])
    torch.testing.assert_close(
        torch.tensor([float(line[4]) for line in lines[1:]]).double(), effects, rtol=1e-4, atol=1e-6
    )


def test_proteins_are_filled_and_drawn(models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("family.a3m").write_text(">first\nMKTAYIAKQRXW\n>second\nMK-ayIAKQR*\n")
    out = told(
        f"demo genomics protein --model {models['protein']} --fasta family.a3m --spans 3-5 0-1 --out a.png", capsys
    )
    filled, name = out.splitlines()[-2:]
    assert name == "a.png"
    assert (len(filled), filled[1:3], filled[5:]) == (12, "KT", "IAKQRXW")
    model = sinuous.load(models["protein"])
    assert filled == sinuous.genomics.fill_spans(model, "MKTAYIAKQRXW", [(0, 1), (3, 5)], ["MKAYIAKQR"])
    assert Image.open("a.png").size[0] > 500


def test_of_a_long_protein_the_beginning_is_drawn(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinuous.genomics.demo_protein.DRAWN", 7)
    Path("long.fa").write_text(">first\nMKTAYIAKQRXW\n")
    out = told(f"demo genomics protein --model {models['protein']} --fasta long.fa --spans 6-9 --out a.png", capsys)
    assert out.splitlines()[-1] == "a.png"


def test_molecules_are_drawn(models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rdkit")
    command = "demo genomics molecules --count 3 --out a.png --smiles a.smi --like CCO c1ccccc1"
    out = told(f"{command} --model {models['molecules']}", capsys)
    assert out.splitlines()[-2:] == ["a.smi", "a.png"]
    assert 1 <= len(list(read_molecules("a.smi"))) <= 3
    assert Image.open("a.png").size[0] > 500


def test_absent_weights_are_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "all_weights", dict)
    monkeypatch.setattr("sinuous.core.demo_parts.all_weights", dict)
    assert "do not come with this version" in told("demo genomics", capsys, code=2)
    assert f"{demo_variants.MODEL} do not come with" in told("demo genomics variants", capsys, code=2)
    assert not list(here.iterdir())


def test_all_parts_run_on_samples_without_a_word(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rdkit")
    pytest.importorskip("Bio")
    for part in demo.PARTS:
        module = demo._module(part)
        monkeypatch.setattr(module, "MODEL", str(models[part]))
    everything = dict.fromkeys(map(str, models.values()))
    monkeypatch.setattr(demo, "all_weights", lambda: everything)
    monkeypatch.setattr("sinuous.core.demo_parts.all_weights", lambda: everything)
    monkeypatch.setattr(demo_annotate, "SAMPLE", (200_000, 206_000))
    monkeypatch.setattr(demo_variants, "PAIRS", 1)
    monkeypatch.setattr(demo_molecules, "COUNT", 2)
    written = told("demo genomics", capsys).splitlines()[-6:]
    assert written == [
        *("sinuous_genes.bed", "sinuous_genes.png", "sinuous_variants.tsv"),
        *("sinuous_protein.png", "sinuous_molecules.smi", "sinuous_molecules.png"),
    ]
    assert sorted(path.name for path in here.iterdir()) == sorted(written)


def test_ctrl_c_leaves_no_file(
    models: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    write_genome(here / "genome.fa")
    monkeypatch.setattr(drawing, "draw_annotation", interrupted)
    command = f"demo genomics annotate --model {models['annotate']} --fasta genome.fa --out a.bed --figure a.png"
    assert "stopped by Ctrl-C" in told(command, capsys, code=130)
    assert [path.name for path in here.iterdir()] == ["genome.fa"]


def test_a_profile_keeps_the_means_of_a_sequence_of_any_length() -> None:
    generator = torch.Generator().manual_seed(0)
    length = 11_003
    p = torch.rand(length, 5, generator=generator).softmax(-1)
    gaps = torch.rand(length, generator=generator) < 0.1
    profile = drawing.Profile(CLASSES)
    parts = [Part("chr1", 50 + i, p[i : i + 700], gaps[i : i + 700]) for i in range(0, length, 700)]
    passed = list(profile.watch([*parts, Part("chr2", 0, p[:9], gaps[:9])]))
    assert len(passed) == len(parts) + 1
    assert (profile.name, profile.start, profile.end) == ("chr1", 50, 50 + length)
    bases, means = profile.means()
    assert len(bases) <= 2 * drawing.COLUMNS
    coding = p[:, 3].double().masked_fill(gaps, 0)
    for place in (0, 7, len(bases) - 1):
        some = slice(place * profile.width, (place + 1) * profile.width)
        assert means[1, place] == pytest.approx(float(coding[some].mean()))
        assert means[4, place] == pytest.approx(float(gaps[some].double().mean()))
        assert bases[place] == pytest.approx(50 + torch.arange(length)[some].double().mean() + 0.5)


def test_flags_are_told_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    for part, flags in {
        "annotate": "--fasta --out --chunk --region --figure",
        "molecules": "--count --like --out --smiles",
        "protein": "--fasta --spans --out",
        "variants": "--fasta --vcf --out",
    }.items():
        parser = argparse.ArgumentParser()
        demo._module(part).add_arguments(parser)
        assert all(flag in parser.format_help() for flag in flags.split())
    assert all(part in told("demo genomics --help", capsys) for part in demo.PARTS)
