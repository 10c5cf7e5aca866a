"""CHAIR: the objects that captions name and that their images lack.

Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156, for the method. The nouns below are common
English for the names of COCO's 80 classes. Loading pycocotools takes half a second, so only the
function that needs it imports it.
"""

import io
import re
from collections import Counter
from contextlib import redirect_stdout
from typing import NamedTuple

from antarctic.distributed import warn_of
from antarctic.errors import InputError
from antarctic.layouts import image_id
from antarctic.texts import one_line, read_json

METRICS = ("CHAIRs", "CHAIRi", "object recall")

# {class: its nouns in the singular, beside its name}
NOUNS = {
    "person": """man, woman, boy, girl, child, kid, baby, toddler, infant, teenager, teen, adult,
        guy, lady, gentleman, male, female, human, individual, somebody, someone, folk, couple,
        crowd, family, audience, mother, father, mom, mommy, dad, daddy, parent, son, daughter,
        brother, sister, husband, wife, grandmother, grandfather, bride, groom, friend, player,
        athlete, batter, hitter, catcher, pitcher, outfielder, umpire, referee, goalie, golfer,
        surfer, skier, snowboarder, skateboarder, skater, boarder, rider, biker, bicyclist, cyclist,
        motorcyclist, jockey, swimmer, runner, jogger, hiker, dancer, singer, musician, performer,
        officer, policeman, policewoman, cop, police, soldier, fireman, firefighter, worker,
        workman, employee, chef, baker, waiter, waitress, vendor, customer, shopper, farmer, cowboy,
        fisherman, driver, passenger, pedestrian, commuter, tourist, traveler, backpacker, visitor,
        spectator, onlooker, bystander, student, teacher, businessman, businesswoman, photographer,
        doctor, nurse, clown""",
    "bicycle": "bike, tricycle, push bike",
    "car": "automobile, auto, sedan, suv, taxi, taxicab, cab, hatchback, minivan, van, jeep, "
           "limousine, limo",
    "motorcycle": "motorbike, motor bike, motor cycle, motor scooter, scooter, moped, dirt bike, "
                  "vespa",
    "airplane": "air plane, aeroplane, plane, jet, jetliner, airliner, aircraft, biplane, seaplane",
    "bus": "minibus, double decker, trolley bus",
    "train": "locomotive, tram, streetcar, street car, trolley car, cable car, train car, train "
             "engine, steam engine, subway car, freight car, rail car, railcar",
    "truck": "pickup, lorry, firetruck, fire engine, semi, tractor trailer",
    "boat": """ship, sailboat, canoe, kayak, yacht, ferry, gondola, dinghy, rowboat, speedboat,
        motorboat, tugboat, houseboat, steamboat, barge, catamaran, vessel""",
    "traffic light": "traffic signal, stoplight, stop light, street signal",
    "fire hydrant": "hydrant, fire plug, fireplug",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": """duck, duckling, goose, gosling, pigeon, dove, seagull, gull, parrot, parakeet,
        cockatoo, macaw, owl, eagle, hawk, falcon, vulture, crow, raven, swan, sparrow, finch,
        robin, hummingbird, woodpecker, blackbird, bluebird, rooster, hen, peacock, pelican,
        ostrich, flamingo, penguin, heron, egret, stork, songbird, waterfowl""",
    "cat": "kitten, kitty, feline, tabby, tomcat",
    "dog": """puppy, pup, doggy, doggie, canine, hound, mutt, poodle, retriever, terrier, labrador,
        dachshund, beagle, collie, husky, bulldog, corgi, chihuahua, spaniel, dalmatian, pug,
        sheepdog, german shepherd, rottweiler, pit bull""",
    "horse": "pony, foal, stallion, mare, colt, filly, horseback",
    "sheep": "lamb, ram, ewe",
    "cow": "cattle, bull, calf, ox, steer, heifer",
    "elephant": "",
    "bear": "cub, grizzly, panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "back pack, knapsack, rucksack, book bag",
    "umbrella": "parasol",
    "handbag": "hand bag, purse, pocketbook, shoulder bag, tote bag",
    "tie": "necktie, neck tie, bowtie",
    "suitcase": "suit case, luggage, baggage",
    "frisbee": "disc, flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, basket ball, foot ball, volley ball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "baseball mitt, mitt, catcher s glove, catchers glove",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, boogie board, body board, paddle board, paddleboard",
    "tennis racket": "racket, racquet",
    "bottle": "",
    "wine glass": "wineglass, glass of wine, champagne glass, champagne flute, goblet",
    "cup": "mug, teacup",
    "fork": "",
    "knife": "",
    "spoon": "teaspoon, tablespoon",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, panini, hoagie",
    "orange": "orange slice, orange segment, orange wedge",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog, frankfurter",
    "pizza": "",
    "donut": "doughnut",
    "cake": "cupcake, cup cake, cheesecake, carrot cake",
    "chair": "armchair, recliner",
    "couch": "sofa, loveseat, love seat, settee, futon",
    "potted plant": "pot plant, house plant, houseplant, potted flower, potted tree, bonsai",
    "bed": "",
    "dining table": "table",
    "toilet": "toilet seat, toilet bowl, commode, urinal",
    "tv": "television, t v, tv set, flatscreen, monitor, computer screen",
    "laptop": "lap top, netbook, notebook computer, macbook",
    "mouse": "",
    "remote": "remote control, remote controller, wiimote, wii controller, game controller",
    "keyboard": "key board",
    "cell phone": "cellphone, phone, smartphone, iphone",
    "microwave": "microwave oven",
    "oven": "stove, stovetop, toaster oven",
    "toaster": "",
    "sink": "washbasin, wash basin, basin",
    "refrigerator": "fridge, freezer",
    "book": "textbook, cookbook, novel",
    "clock": "",
    "vase": "",
    "scissors": "scissor, shears",
    "teddy bear": "teddy, toy bear, stuffed bear, stuffed animal, stuffed toy, plush toy",
    "hair drier": "hair dryer, hairdrier, hairdryer, blow drier, blow dryer",
    "toothbrush": "tooth brush",
}
# Phrases that hold one of the nouns and name no such object.
OTHER_THINGS = """couple of, family of, pitcher of, family room, gingerbread man, snow man, man
    made, baby carriage, baby stroller, child s toy, crowd control, bus stop, bus station, bus lane,
    bus depot, bus terminal, bus shelter, train station, train track, train platform, train yard,
    train depot, train set, train terminal, boat dock, boat house, boat ramp, jet ski, jet engine,
    jet stream, paper plane, paper airplane, car seat, car park, bike lane, bike path, bike rack,
    bike trail, bicycle lane, bicycle path, bicycle rack, bird house, bird feeder, bird cage, bird
    bath, rubber duck, dog house, dog bed, dog food, dog bowl, corn dog, cat bed, cat food, cat toy,
    pet bed, rocking horse, saw horse, carousel horse, battering ram, cow print, zebra print, zebra
    crossing, umbrella stand, zip tie, railroad tie, ski lift, ski slope, ski pole, ski resort, ski
    jacket, ski boot, ski suit, ski hill, ski run, ski trail, ski lodge, ski mask, ski goggle, jet
    skis, ball game, ball park, ball field, ball cap, meat ball, snow ball, cotton ball, disco ball,
    at bat, to bat, oven mitt, bottle cap, bottle opener, fork lift, world cup, super bowl, apple
    logo, pizza box, pizza cutter, pizza shop, pizza parlor, pizza place, pizza pan, crab cake, rice
    cake, cake stand, chair lift, wheel chair, flower bed, truck bed, river bed, garden bed, bed
    sheet, bed spread, bed room, bed of, pool table, ping pong table, table tennis, table cloth,
    changing table, night table, toilet paper, toilet tissue, toilet roll, toilet brush, tv show, tv
    stand, tv station, tv tray, laptop bag, laptop case, mickey mouse, minnie mouse, mouse pad,
    remote area, remote location, remote place, remote road, remote island, remote beach, remote
    controlled, piano keyboard, phone booth, pay phone, phone pole, microwave dinner, dutch oven,
    book shelf, book case, book store, o clock, scissor lift, horse shoe, lady bug, visitor center,
    record player, mp3 player, cd player, dvd player, music player, screw driver"""
# Phrases that begin like an object and name another one.
OTHER_OBJECTS = {"bus driver": "person", "train conductor": "person", "boat captain": "person",
                 "ball player": "person", "pizza chef": "person", "dog walker": "person",
                 "horse rider": "person", "bike rider": "person", "tv remote": "remote",
                 "bicycle rider": "person", "motorcycle rider": "person", "bow tie": "tie",
                 "truck driver": "person", "taxi driver": "person", "car driver": "person",
                 "table runner": "dining table"}
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
OF_ANIMALS = ("baby", "mother", "father", "mom", "mama", "parent", "adult", "male", "female",
              "teen", "infant", "child", "family of", "couple of", "crowd of")
# "orange" is a fruit after one of the first and before one of the others, else a colour. "." is
# the end of a clause.
ONE_FRUIT = ("an", "one", "whole", "half", "peeled", "sliced", "cut", "single", "fresh", "ripe")
AFTER_FRUIT = (".", "and a", "and an", "on", "in", "is", "next", "with", "from", "beside", "near")
IRREGULAR = {"person": "people", "child": "children", "goose": "geese", "mouse": "mice",
             "ox": "oxen", "calf": "calves", "knife": "knives", "wife": "wives", "bus": "buses",
             "sheep": "sheep", "aircraft": "aircraft", "cattle": "cattle", "police": "police",
             "human": "humans", "glass of wine": "glasses of wine"}


# ------------------------------------------------------------------------------------------ objects

def words_of(text):
    """Lower-cased words; "." stands for punctuation. Hyphens and apostrophes separate words."""
    return [word if word.isalnum() else "."
            for word in re.findall(r"[^\W_]+|[^\w\s'’-]", text.lower())]


def plural(noun):
    """The plural of a noun, or of a phrase by its last word."""
    rest, space, last = noun.rpartition(" ")
    if noun in IRREGULAR or last in IRREGULAR:
        return IRREGULAR.get(noun) or rest + space + IRREGULAR[last]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")


def split_list(text):
    return [" ".join(noun.split()) for noun in text.split(",") if noun.strip()]


def lexicon(classes):
    """{phrase, a tuple of words: the class that it names, or None}, singular and plural.

    classes: names, of COCO's or others; those are named by their names alone. A noun of a class
    that is not among them names nothing.
    """
    phrases = dict.fromkeys(split_list(OTHER_THINGS)) | OTHER_OBJECTS
    nouns = {noun: name for name, text in NOUNS.items() for noun in [name, *split_list(text)]}
    animals = {noun: name for noun, name in nouns.items() if name in ANIMALS}
    phrases |= {f"{word} {noun}": name for noun, name in animals.items() for word in OF_ANIMALS}
    phrases |= {f"{noun} {young}": name for noun, name in animals.items()
                for young in ("calf", "cub")}
    phrases |= nouns | {name: name for name in classes}
    phrases = {plural(noun): name for noun, name in phrases.items()} | phrases
    phrases |= {"persons": "person", "busses": "bus"}
    phrases |= {f"{first} orange {after}": "orange" for first in ONE_FRUIT for after in AFTER_FRUIT}
    phrases["orange"] = None
    return {tuple(phrase.split()): name if name in classes else None
            for phrase, name in phrases.items()}


def named_objects(texts, phrases):
    """The set of classes that each text names. Longer phrases come first: "hot dog" is no dog.
    phrases: of lexicon()."""
    longest = max(map(len, phrases))
    return [named_in([*words_of(text), "."], phrases, longest) for text in texts]


def named_in(words, phrases, longest):
    named, i = set(), 0
    while i < len(words):
        ends = range(min(longest, len(words) - i), 0, -1)
        length = next((n for n in ends if tuple(words[i:i + n]) in phrases), 0)
        if length:
            named.add(phrases[tuple(words[i:i + length])])
        i += max(1, length)
    return named - {None}


# ------------------------------------------------------------------------------------ ground truth

class Instances(NamedTuple):
    classes: set  # names, lower-cased and without punctuation
    objects: dict  # {image id: set of names}; an image may have none


def read_instances(path, rows):
    """The Instances of a file in the layout of COCO's instances_val2017.json.

    rows: a list of pairs.Scored. A warning names the images of these that the file lacks. Raises
    InputError where it lacks all of them, or is something else.
    """
    from pycocotools.coco import COCO
    coco = COCO()
    try:
        coco.dataset = read_json(path, "instances file")
        with redirect_stdout(io.StringIO()):  # it prints that it makes an index
            coco.createIndex()
        names = {number: class_name(category["name"], path)
                 for number, category in coco.cats.items()}
        objects = {image_id(image): {names[thing["category_id"]]
                                     for thing in coco.imgToAnns.get(image, ())}
                   for image in coco.imgs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a COCO instances file "
                         f"({type(error).__name__}: {error})") from error
    if not any(objects.values()):
        raise InputError(f"there is no object in {path}; it must be a COCO instances file, with "
                         "images, annotations and categories")
    without = [row.id for row in rows if row.id not in objects]
    if len(without) == len(rows):
        raise InputError(f"none of the {len(rows)} images of the captions, such as "
                         f"{without[0]!r}, is in {path}")
    warn_of(without, f"images are not in {path} and are left out of CHAIR")
    return Instances(set(names.values()), objects)


def class_name(text, path):
    """A category's name as the lexicon needs it. Raises ValueError where it has no word."""
    name = " ".join(word for word in words_of(one_line(text, path, 100)) if word != ".")
    if not name:
        raise ValueError(f"the category {text!r} has no word")
    return name


# ------------------------------------------------------------------------------------------ scores

def named_and_present(rows, instances):
    """{row: (the objects that its caption names, those that its image holds)}. An image holds its
    instances and what its references name. rows: a list of pairs.Scored; those whose image the
    instances lack are left out."""
    phrases = lexicon(instances.classes)
    objects = {}
    for i, row in enumerate(rows):
        if row.id in instances.objects:
            named, *others = named_objects([row.caption, *row.references], phrases)
            objects[i] = named, instances.objects[row.id].union(*others)
    return objects


def hallucinated(objects):
    """{object: captions that name it though their images lack it}, the most frequent first.
    objects: of named_and_present."""
    counts = Counter(name for named, present in objects.values() for name in named - present)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class Counts(NamedTuple):
    captions: int
    hallucinating: int  # captions that name an object which is not there
    named: int  # objects, each once a caption
    hallucinated: int
    present: int  # objects, each once an image
    recalled: int


def object_counts(named, present):
    """The Counts of captions. named, present: for each of N captions the set of objects that it
    names, and of those that its image holds."""
    wrong = [len(names - there) for names, there in zip(named, present)]
    return Counts(len(wrong), sum(map(bool, wrong)), sum(map(len, named)), sum(wrong),
                  sum(map(len, present)),
                  sum(len(names & there) for names, there in zip(named, present)))


def chair_scores(counts):
    """{metric of METRICS: share}, without those that would be a share of nothing."""
    shares = zip(METRICS, ((counts.hallucinating, counts.captions),
                           (counts.hallucinated, counts.named), (counts.recalled, counts.present)))
    return {metric: part / whole for metric, (part, whole) in shares if whole}
