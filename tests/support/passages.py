"""Three texts on which models are compared: English prose, Python and German prose."""

import inspect
import json

from gemma_fast.benchmarks.verify.ids import read_text

# Franz Kafka, Die Verwandlung (1915).
GERMAN = """\
Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu einem
ungeheueren Ungeziefer verwandelt. Er lag auf seinem panzerartig harten Rücken und sah, wenn er den
Kopf ein wenig hob, seinen gewölbten, braunen, von bogenförmigen Versteifungen geteilten Bauch, auf
dessen Höhe sich die Bettdecke, zum gänzlichen Niedergleiten bereit, kaum noch erhalten konnte.
Seine vielen, im Vergleich zu seinem sonstigen Umfang kläglich dünnen Beine flimmerten ihm hilflos
vor den Augen. »Was ist mit mir geschehen?« dachte er. Es war kein Traum. Sein Zimmer, ein
richtiges, nur etwas zu kleines Menschenzimmer, lag ruhig zwischen den vier wohlbekannten Wänden.
Über dem Tisch, auf dem eine auseinandergepackte Musterkollektion von Tuchwaren ausgebreitet war –
Samsa war Reisender –, hing das Bild, das er vor kurzem aus einer illustrierten Zeitschrift
ausgeschnitten und in einem hübschen, vergoldeten Rahmen untergebracht hatte. Es stellte eine Dame
dar, die, mit einem Pelzhut und einer Pelzboa versehen, aufrecht dasaß und einen schweren Pelzmuff,
in dem ihr ganzer Unterarm verschwunden war, dem Beschauer entgegenhob."""

PASSAGES = {
    "English": read_text(),
    "Python": inspect.getsource(json.decoder)[:2400],
    "German": GERMAN.replace("\n", " "),
}
