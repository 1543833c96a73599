"""Names, ids and display colours of the COCO categories and person keypoints."""

from __future__ import annotations

from typing import Any

# RGB colour and name of each category in the order of their ids, which skip _UNUSED_IDS.
_COCO_THINGS = """
    dc143c person; 770b20 bicycle; 00008e car; 0000e6 motorcycle; 6a00e4 airplane; 003c64 bus;
    005064 train; 000046 truck; 0000c0 boat; faaa1e traffic light; 64aa1e fire hydrant; dcdc00 stop sign;
    af74af parking meter; fa001e bench; a52a2a bird; ff4dff cat; 00e2fc dog; b6b6ff horse; 005200 sheep;
    78a69d cow; 6e4c00 elephant; ae39ff bear; c76400 zebra; 480076 giraffe; ffb3f0 backpack;
    007d5c umbrella; d10097 handbag; bcd0b6 tie; 00dcb0 suitcase; ff63a4 frisbee; 5c0049 skis;
    8581ff snowboard; 4eb4ff sports ball; 00e400 kite; aefff3 baseball bat; 2d59ff baseball glove;
    868667 skateboard; 9194ae surfboard; ffd0ba tennis racket; c5e2ff bottle; ab8601 wine glass;
    6d3f36 cup; cf8aff fork; 97005f knife; 09503d spoon; 546933 bowl; 4a4169 banana; a6c466 apple;
    d0c3d2 sandwich; ff6d41 orange; 008f95 broccoli; b300c2 carrot; d1636a hot dog; 057900 pizza;
    e3ffcd donut; 93bad0 cake; 994501 chair; 035fa1 couch; a3ff00 potted plant; 7700aa bed;
    00b6c7 dining table; 00a578 toilet; b78258 tv; 5f2000 laptop; 827287 mouse; 6e8185 remote;
    a64a76 keyboard; db8eb9 cell phone; 4fd272 microwave; b25a3e oven; 41460f toaster; 7fa773 sink;
    3b696a refrigerator; 8e6c2d book; c4ac00 clock; 5f3650 vase; 804cff scissors; c93901 teddy bear;
    f6007a hair drier; bfa2d0 toothbrush
"""
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

_PAIRED_PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
# Lines of the skeleton: first point, second point (l_ and r_ for left and right), RGB colour.
_SKELETON = """
    l_ear l_eye 66ccff; r_ear r_eye 3399ff; l_eye nose 6600cc; nose r_eye 3366ff;
    l_shoulder r_shoulder ff8000; l_shoulder l_elbow 99ffcc; r_shoulder r_elbow 80e5ff;
    l_elbow l_wrist 99ff99; r_elbow r_wrist 66ffe0; l_hip r_hip ff6600; l_hip l_knee ffff4d;
    r_hip r_knee 99ffcc; l_knee l_ankle bfff80; r_knee r_ankle ffc34d
"""


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code))


def _entries(table: str) -> list[list[str]]:
    return [entry.split() for entry in table.split(";")]


def _categories() -> list[dict[str, Any]]:
    ids = (number for number in range(1, 91) if number not in _UNUSED_IDS)
    return [
        {"id": number, "name": " ".join(words), "color": list(_rgb(code)), "isthing": 1}
        for number, (code, *words) in zip(ids, _entries(_COCO_THINGS), strict=True)
    ]


def _full_name(point: str) -> str:
    return point.replace("l_", "left_").replace("r_", "right_")


COCO_CATEGORIES = _categories()
COCO_PERSON_KEYPOINT_FLIP_MAP = tuple((f"left_{part}", f"right_{part}") for part in _PAIRED_PARTS)
COCO_PERSON_KEYPOINT_NAMES = ("nose", *(name for pair in COCO_PERSON_KEYPOINT_FLIP_MAP for name in pair))
KEYPOINT_CONNECTION_RULES = [(_full_name(a), _full_name(b), _rgb(code)) for a, b, code in _entries(_SKELETON)]


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Metadata of "coco" (80 categories) or "coco_person" (one category with keypoints)."""
    if dataset_name == "coco":
        return {
            "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(COCO_CATEGORIES)},
            "thing_classes": [c["name"] for c in COCO_CATEGORIES],
            "thing_colors": [c["color"] for c in COCO_CATEGORIES],
        }
    if dataset_name == "coco_person":
        return {
            "keypoint_connection_rules": KEYPOINT_CONNECTION_RULES,
            "keypoint_flip_map": COCO_PERSON_KEYPOINT_FLIP_MAP,
            "keypoint_names": COCO_PERSON_KEYPOINT_NAMES,
            "thing_classes": ["person"],
        }
    raise KeyError(f"There is no built-in metadata for '{dataset_name}', only for 'coco' and 'coco_person'.")
