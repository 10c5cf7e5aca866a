"""CHAIR: which objects a caption names, what an image holds, and files that are no instances."""

import json

import pytest

from antarctic import chair
from antarctic.errors import InputError
from antarctic.pairs import Scored

COCO = chair.lexicon(set(chair.NOUNS))

NAMED = {  # {caption: the classes that it names}
    "A man, two women and some children": {"person"},
    "People watch policemen; the firefighter's dogs sleep": {"person", "dog"},
    "a puppy on a bike": {"dog", "bicycle"},
    "PUPPIES beside BUSES and sandwiches": {"dog", "bus", "sandwich"},
    "three geese, two mice, an ox, knives and sheep": {"bird", "mouse", "cow", "knife", "sheep"},
    "a hot dog on a plate": {"hot dog"}, "hot-dogs and hotdogs": {"hot dog"},
    "a hot, tired dog": {"dog"},
    "a teddy bear": {"teddy bear"}, "stuffed animals": {"teddy bear"}, "polar bears": {"bear"},
    "a fire hydrant by a traffic light": {"fire hydrant", "traffic light"},
    "a fire truck": {"truck"}, "a bus driver": {"person"}, "at the bus stop": set(),
    "a baby elephant": {"elephant"}, "a mother giraffe with her calf": {"giraffe", "cow"},
    "an elephant calf": {"elephant"}, "a baby": {"person"},
    "a toilet seat": {"toilet"}, "toilet paper": set(),
    "a couple of zebras": {"zebra"}, "a couple on a couch": {"person", "couch"},
    "a family of ducks": {"bird"}, "a herd of cattle": {"cow"},
    "an orange cat": {"cat"}, "an orange and white bus": {"bus"}, "dressed in orange": set(),
    "an orange on a table": {"orange", "dining table"}, "two oranges": {"orange"},
    "a glass of wine, a wine glass": {"wine glass"}, "a glass": set(),
    "glasses of wine": {"wine glass"},
    "a stove top oven and a microwave oven": {"oven", "microwave"},
    "a computer mouse near a laptop computer": {"mouse", "laptop"},
    "a clock tower at 6 o'clock": {"clock"}, "a pool table": set(), "a cupcake": {"cake"},
    "a skateboarder with his skateboard": {"person", "skateboard"},
    "a pair of scissors": {"scissors"}, "a lone ski": {"skis"}, "a ski lift": set(),
    "a tennis player with a racquet": {"person", "tennis racket"},
    "humans on horseback": {"person", "horse"}, "a doughnut": {"donut"},
    "": set(), "...": set(), "\u0000 🐕 ": set(),
}


@pytest.mark.parametrize("caption", NAMED, ids=lambda caption: caption or "empty")
def test_a_caption_names_objects_by_their_nouns_in_both_numbers(caption):
    assert chair.named_objects([caption], COCO) == [NAMED[caption]]


@pytest.mark.parametrize("name", chair.NOUNS)
def test_every_class_is_named_by_its_name_and_its_nouns_and_their_plurals(name):
    for noun in {name, *chair.split_list(chair.NOUNS[name])} - {"orange"}:
        for text in (f"the {noun} there", f"two {chair.plural(noun)}."):
            assert chair.named_objects([text], COCO) == [{name}], text


def test_no_noun_belongs_to_two_classes():
    nouns = [noun for name, text in chair.NOUNS.items()
             for noun in (name, *chair.split_list(text))]
    assert len(nouns) == len(set(nouns)) and len(chair.NOUNS) == 80


def test_only_classes_of_the_file_count_and_others_than_cocos_are_known_by_name():
    phrases = chair.lexicon({"dog", "snow leopard", "van"})
    assert chair.named_objects(["a man, hot dogs, puppies", "Snow leopards near a van", "a taxi"],
                               phrases) == [{"dog"}, {"snow leopard", "van"}, set()]


# ---------------------------------------------------------------------------------- ground truth

IMAGES = {1: ["dog", "person"], 2: ["cat"], 3: []}


def instances(folder, objects=IMAGES, **changes):
    """Writes a file in the form of instances_val2017.json. objects: {image id: their names}."""
    classes = list(chair.NOUNS)
    things = [(image, name) for image, names in objects.items() for name in names]
    data = {
        "info": {"year": 2017}, "licenses": [{"id": 1, "name": "CC BY 2.0", "url": ""}],
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 4} for i in objects],
        "annotations": [{"id": i, "image_id": image, "category_id": classes.index(name) + 1,
                         "bbox": [0, 0, 2, 2], "area": 4.0, "iscrowd": 0,
                         "segmentation": [[0, 0, 2, 0, 2, 2]]}
                        for i, (image, name) in enumerate(things)],
        "categories": [{"id": i + 1, "name": name, "supercategory": "thing"}
                       for i, name in enumerate(classes)]}
    path = folder / "instances.json"
    path.write_text(json.dumps(data | changes))
    return path


ROWS = [Scored(1, "a man with a puppy and a cat", ["a dog"]),
        Scored(2, "a cat on a bed", ["a bed"]), Scored(3, "a bus"), Scored(4, "a bus")]


def test_the_shares_are_those_of_the_paper(tmp_path, capfd):
    found = chair.read_instances(instances(tmp_path), ROWS)
    out, err = capfd.readouterr()
    assert not out and "1 images are not in" in err and err.rstrip().endswith(": 4")
    objects = chair.named_and_present(ROWS, found)
    assert objects == {0: ({"person", "dog", "cat"}, {"person", "dog"}),
                       1: ({"cat", "bed"}, {"cat", "bed"}),  # the reference names the bed
                       2: ({"bus"}, set())}
    counts = chair.object_counts(*zip(*objects.values()))
    assert counts == (3, 2, 6, 2, 4, 4)
    assert chair.chair_scores(counts) == {"CHAIRs": 2 / 3, "CHAIRi": 2 / 6, "object recall": 1}
    assert chair.hallucinated(objects) == {"bus": 1, "cat": 1}


def test_a_share_of_nothing_is_left_out():
    assert chair.chair_scores(chair.object_counts([set()], [set()])) == {"CHAIRs": 0}


def test_instances_of_other_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="none of the 1 images of the captions, such as 9, is in"):
        chair.read_instances(instances(tmp_path), [Scored(9, "a dog")])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [
    "", "a dog", "7", "null", "[]", "{}", '"annotations"', DEEP, '{"images": ' + DEEP + "}",
    "9" * 5000, '{"images": 5}', '{"images": [1], "annotations": [], "categories": []}', "\0" * 9])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(InputError, match="instances"):
        chair.read_instances(path, ROWS)


@pytest.mark.parametrize("changes", [
    {"annotations": [{"id": 1, "image_id": 1, "category_id": 99}]},
    {"annotations": [{"id": 1, "image_id": [], "category_id": 1}]},
    {"annotations": [{"id": 1, "image_id": 1, "category_id": {}}]},
    {"annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]},  # COCO's caption file
    {"annotations": [{"image_id": 1}]}, {"annotations": None}, {"images": [{}]},
    {"images": [{"id": []}]}, {"categories": None}, {"categories": [{"id": 1}]},
    {"categories": [{"id": 1, "name": 5}]}, {"categories": [{"id": 1, "name": "..."}]},
    {"categories": [{"id": 1, "name": "a " * 10**6}]}], ids=str)
def test_damaged_instances_are_refused_in_one_sentence(tmp_path, changes):
    path = instances(tmp_path, **changes)
    with pytest.raises(InputError) as refusal:
        chair.read_instances(path, ROWS)
    assert str(path) in str(refusal.value) and len(str(refusal.value)) < 500
    path.unlink()
    with pytest.raises(InputError, match="there is no instances file"):
        chair.read_instances(path, ROWS)
