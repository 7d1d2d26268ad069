"""Labels and tasks: numbers, names, colours, and the numbers that are written."""

import pytest

from blosam_monai.data.tasks import check_names, check_values, output_values, parse_labels, task_values


@pytest.mark.parametrize("tasks", [["lung", "lung"], ["liver"], [], ["background"]])
def test_tasks_must_be_labels_each_once(tasks):
    with pytest.raises(ValueError, match="must be some of the labels lung, heart, each once"):
        task_values({"background": 0, "lung": 1, "heart": "Heart"}, tasks)


def test_background_of_any_value_is_no_task():
    assert task_values({"background": "#000000", "none": 0, "lung": "#0000FF"}) == {"lung": ["#0000ff"]}


def test_written_numbers_of_names_are_their_places_whatever_the_tasks():
    labels = {"background": 0, "liver": "Liver", "spleen": ["Spleen", "Milz"], "kidney": "#FF0000"}
    assert output_values(labels, ["kidney", "liver"]) == {"kidney": 3, "liver": 1}


def test_tasks_that_would_be_written_alike_are_refused():
    labels = {"background": 0, "thorax": [1, 2], "lung": 1}
    with pytest.raises(ValueError, match="thorax and lung would both be written as 1"):
        output_values(labels)
    assert output_values(labels, ["lung"]) == {"lung": 1}


@pytest.mark.parametrize("labels", [["lung"], {"lung": []}, {"lung": None}, {"lung": [1, 2.5]}, {"lung": {"a": 1}}])
def test_labels_of_another_form_are_refused(labels):
    with pytest.raises(ValueError, match="is not names and values"):
        parse_labels(labels)


@pytest.mark.parametrize(
    ("value", "coding", "kind"),
    [
        ("Liver", "index", "numbers"),
        ([1, "x"], "threshold", "numbers"),
        (1, "segments", "names"),
        (5, "colour", "names"),
    ],
)
def test_values_of_another_kind_than_the_coding_are_refused(value, coding, kind):
    with pytest.raises(ValueError, match=f"labels: liver is .*, the values of label_coding '{coding}' are {kind}"):
        check_values({"background": 0, "liver": value}, coding)


def test_a_name_spelt_otherwise_is_refused_with_both_spellings():
    with pytest.raises(ValueError, match=r"p\.dcm: has 'LIVER' and no 'Liver'; write both names alike"):
        check_names("p.dcm", ["LIVER", "Spleen"], {"liver": "Liver", "spleen": "Spleen"}, "segments")


def test_segments_none_of_which_the_list_knows_are_refused_and_colours_noted():
    with pytest.raises(ValueError, match=r"has the names Kidney and none of the data list's labels \(Liver\)"):
        check_names("p.dcm", ["Kidney"], {"liver": "Liver"}, "segments")
    assert check_names("p.png", ["#00ff00"], {"liver": "#ff0000"}, "colour") == (
        "1 of 1 names of the list are not in the label, which has 1 others",
    )


def test_a_structure_that_a_patient_does_not_have_is_no_fault():
    labels = {"background": 0, "liver": "Liver", "lesion": "Lesion"}
    assert check_names("p.dcm", ["Liver"], labels, "segments") == ()
    assert len(check_names("p.dcm", ["Liver", "Kidney"], labels, "segments")) == 1


def test_threshold_knows_one_class():
    check_values({"background": 0, "polyp": 255}, "threshold")
    with pytest.raises(ValueError, match="threshold tells one class from background, the list names 2; name one"):
        check_values({"background": 0, "disc": 128, "cup": 255}, "threshold")


@pytest.mark.parametrize("labels", [{}, {"background": 0}])
def test_labels_without_a_class_are_said_to_be_missing(labels):
    with pytest.raises(ValueError, match="labels: no class beside background; give names and values"):
        task_values(labels)


@pytest.mark.parametrize("labels", [{"lung": True}, {"lung": [1, False]}, 5, True])
def test_a_label_value_is_a_number_or_a_name(labels):
    with pytest.raises(ValueError, match="is not names and values"):
        parse_labels(labels)


def test_one_name_of_two_values_is_refused_in_decathlons_form():
    with pytest.raises(ValueError, match="has one name twice; write a union"):
        parse_labels({"1": "lung", "2": "lung"})
