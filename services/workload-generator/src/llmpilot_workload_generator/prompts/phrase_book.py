"""The words and sentence patterns of the default corpus, all of them our own.

Invariant: plain ASCII; every pattern reads as English with any word of the lists it names.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """What one paragraph is about."""

    people: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]
    deeds: tuple[str, ...]
    """What somebody did to something."""
    qualities: tuple[str, ...]


def _theme(people: str, things: str, places: str, deeds: str, qualities: str) -> Theme:
    return Theme(
        people=_listed(people),
        things=_listed(things),
        places=_listed(places),
        deeds=_listed(deeds),
        qualities=_listed(qualities),
    )


def _listed(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


THEMES = (
    _theme(
        "cook, baker, guest, waiter, neighbour, grandmother, butcher, apprentice",
        "soup, bread, pan, oven, recipe, onion, pepper, butter, sauce, knife, plate, cheese, kettle, spoon, salad, "
        "rice, lemon, cake, flour, bottle, table, dinner, breakfast, basket, garlic, honey",
        "kitchen, market, cellar, pantry, dining room, bakery, inn, courtyard",
        "tasted, stirred, sliced, served, warmed, cooled, salted, covered, shared, burned, washed, weighed, mixed",
        "fresh, sweet, bitter, salty, warm, golden, crisp, tender, sharp, plain, rich, smooth, sour",
    ),
    _theme(
        "gardener, farmer, botanist, beekeeper, shepherd, visitor, child, forester",
        "rose, fence, apple tree, hedge, seed, shovel, pond, lawn, pumpkin, hive, ladder, path, soil, leaf, branch, "
        "bench, bucket, root, flower, meadow, greenhouse, tractor, harvest, barn, goat, orchard, willow",
        "garden, valley, field, orchard, forest, village, stable, hillside",
        "planted, watered, trimmed, gathered, dug up, painted, mowed, fed, protected, counted, climbed, moved",
        "green, tall, muddy, ripe, wild, shady, dry, dense, young, crooked, fragrant, quiet, sunny",
    ),
    _theme(
        "traveller, driver, pilot, conductor, tourist, captain, guide, passenger, porter",
        "train, ticket, suitcase, bridge, ferry, road, map, passport, timetable, platform, bicycle, engine, cabin, "
        "tunnel, harbour, journey, wheel, compass, hotel, window, luggage, tram, boat, lantern, coast, island",
        "station, airport, port, city, border, mountain pass, old town, waiting room",
        "missed, reached, crossed, booked, followed, photographed, repaired, left behind, recognised, boarded, drew",
        "distant, crowded, narrow, foreign, late, early, cheap, scenic, foggy, steep, famous, noisy, winding",
    ),
    _theme(
        "manager, clerk, accountant, secretary, consultant, director, auditor, customer, lawyer",
        "contract, invoice, budget, meeting, letter, report, calendar, desk, telephone, proposal, signature, salary, "
        "order, office, archive, agreement, deadline, printer, summary, account, payment, folder, department, minutes",
        "headquarters, meeting room, branch office, lobby, bank, warehouse, court, reception",
        "signed, approved, rejected, postponed, prepared, copied, filed, discussed, calculated, revised, delivered, "
        "lost",
        "urgent, annual, formal, missing, detailed, legal, private, final, brief, costly, modest, complete, quarterly",
    ),
    _theme(
        "teacher, student, professor, librarian, pupil, tutor, scholar, examiner",
        "lesson, book, exam, essay, blackboard, question, answer, pencil, lecture, notebook, chapter, equation, "
        "dictionary, poem, grade, experiment, museum, globe, course, library, sentence, page, proof, lecture hall, "
        "riddle",
        "school, classroom, university, reading room, laboratory, playground, seminar, academy",
        "read, explained, solved, borrowed, memorised, corrected, translated, quoted, underlined, forgot, repeated, "
        "wrote",
        "difficult, simple, ancient, curious, clever, long, short, obvious, strange, patient, careful, useful, rare",
    ),
    _theme(
        "carpenter, mechanic, plumber, electrician, smith, builder, inventor, painter, foreman",
        "hammer, screw, pipe, motor, cable, wall, roof, beam, drill, saw, hinge, pump, spring, lever, wire, valve, "
        "brick, paint, toolbox, switch, gear, lock, floor, stair, nail, bolt, axle",
        "workshop, garage, building site, factory, shed, basement, attic, yard",
        "fixed, measured, sanded, tightened, welded, replaced, bent, cut, assembled, oiled, tested, dropped, polished",
        "heavy, rusty, solid, loose, wooden, broken, spare, hollow, flat, square, rough, sturdy, oily",
    ),
    _theme(
        "doctor, nurse, patient, surgeon, pharmacist, dentist, therapist, midwife",
        "bandage, medicine, symptom, fever, heart, needle, diagnosis, prescription, ward, pulse, treatment, wound, "
        "lung, vaccine, bone, pill, appointment, blood sample, headache, ambulance, thermometer, allergy, bed, diet",
        "hospital, clinic, pharmacy, operating room, surgery, corridor, nursing home, emergency room",
        "examined, treated, noticed, recorded, cleaned, monitored, ignored, described, checked, healed, cured, feared",
        "healthy, pale, painful, mild, serious, sterile, weak, strong, chronic, sudden, calm, tired, harmless",
    ),
    _theme(
        "programmer, operator, architect, developer, tester, reviewer, administrator, analyst, maintainer",
        "server, function, database, compiler, cache, queue, thread, process, log file, memory, kernel, parser, "
        "script, variable, loop, buffer, backup, release, interface, test suite, pointer, module, disk, scheduler, "
        "table, index",
        "data centre, terminal, repository, test bench, control room, cluster, staging area, open office",
        "deployed, rewrote, profiled, restarted, compiled, deleted, debugged, patched, merged, cached, documented, "
        "renamed",
        "slow, fast, idle, empty, hidden, global, local, stable, recursive, modern, corrupt, shared, redundant",
    ),
    _theme(
        "researcher, scientist, statistician, engineer, annotator, editor, critic, speaker",
        "model, data set, gradient, layer, prompt, token, batch, vocabulary, benchmark, weight, matrix, embedding, "
        "training run, prediction, label, error, graph, accelerator, checkpoint, baseline, metric, reply, request, "
        "sample, vector",
        "laboratory, conference, computing centre, notebook, evaluation room, institute, lecture, archive",
        "trained, evaluated, compared, sampled, plotted, published, reproduced, doubted, scaled, pruned, quantised, "
        "averaged",
        "large, small, accurate, noisy, sparse, random, biased, linear, deep, robust, wrong, promising, expensive",
    ),
    _theme(
        "technician, provider, installer, caller, dispatcher, inspector, subscriber, radio amateur",
        "router, packet, antenna, signal, channel, link, modem, satellite, protocol, address, message, connection, "
        "tower, receiver, bandwidth, latency, gateway, password, fibre, socket, relay, port, broadcast, firewall, "
        "header",
        "network, exchange, tower room, mast, street cabinet, cable duct, ground station, server room",
        "sent, received, blocked, encrypted, routed, traced, amplified, dropped, resent, delayed, filtered, jammed",
        "wireless, secure, digital, remote, public, faint, wide, clear, unstable, busy, direct, silent, spare",
    ),
    _theme(
        "musician, singer, actor, composer, dancer, violinist, listener, poet, drummer",
        "song, violin, stage, concert, piano, melody, costume, curtain, rhythm, trumpet, audience, rehearsal, score, "
        "guitar, drum, opera, choir, voice, dance, theatre, ticket office, record, applause, mask, script, flute",
        "concert hall, studio, theatre, ballroom, festival, square, chapel, rehearsal room",
        "played, sang, practised, performed, recorded, applauded, composed, tuned, heard, improvised, loved, hummed",
        "loud, gentle, slow, lively, sad, cheerful, elegant, famous, dramatic, modern, simple, brilliant, solemn",
    ),
    _theme(
        "runner, coach, player, referee, swimmer, goalkeeper, spectator, climber, rower",
        "ball, race, goal, team, medal, match, stadium, whistle, rope, record, jersey, score board, trophy, bicycle, "
        "tournament, racket, finish line, net, boot, track, penalty, stopwatch, helmet, victory, injury, season",
        "stadium, gym, pool, training camp, arena, locker room, ice rink, football field",
        "won, lost, kicked, caught, threw, watched, planned, celebrated, timed, trained for, disputed, remembered",
        "fair, tough, quick, exciting, equal, proud, exhausted, brave, young, decisive, hard, friendly, national",
    ),
    _theme(
        "sailor, meteorologist, hiker, fisherman, ranger, observer, lighthouse keeper, photographer",
        "cloud, storm, river, snow, wind, tide, lake, glacier, rainbow, thunder, forecast, wave, shore, barometer, "
        "mist, frost, sunrise, rock, cave, waterfall, desert, drought, flood, mountain, lightning, cliff",
        "coast, weather station, summit, bay, national park, cabin, lighthouse, delta",
        "predicted, watched, feared, admired, survived, measured, described, escaped, mapped, reported, expected, saw",
        "cold, grey, bright, icy, mild, calm, violent, deep, high, frozen, humid, endless, clear",
    ),
    _theme(
        "shopkeeper, buyer, tailor, merchant, jeweller, cashier, collector, dealer",
        "coat, price, shoe, mirror, ring, coin, scale, shelf, bargain, receipt, fabric, button, watch, lamp, chair, "
        "carpet, vase, painting, glove, hat, silk, parcel, discount, purse, umbrella, clock, drawer",
        "shop, bazaar, department store, gallery, auction, high street, counter, flea market",
        "sold, bought, wrapped, returned, compared, ordered, mended, displayed, chose, refused, exchanged, valued",
        "cheap, precious, used, leather, colourful, fashionable, fragile, genuine, silver, soft, second, faded, "
        "elegant",
    ),
    _theme(
        "mayor, architect, citizen, reporter, judge, tenant, policeman, historian, librarian",
        "street, tower, law, election, newspaper, park, fountain, tax, statue, plan, building, gate, vote, speech, "
        "rumour, square, housing, cathedral, traffic light, monument, committee, treaty, archive, strike, budget, "
        "crowd",
        "town hall, city centre, suburb, parliament, museum, council, old quarter, embassy",
        "opened, debated, criticised, restored, announced, changed, promised, closed, voted for, investigated, "
        "printed, built",
        "public, historic, corrupt, popular, official, grand, local, open, political, unusual, political, civil, "
        "famous",
    ),
    _theme(
        "chemist, physicist, astronomer, biologist, assistant, geologist, explorer, curator",
        "telescope, planet, crystal, atom, cell, microscope, fossil, comet, magnet, liquid, gas, flask, theory, star, "
        "formula, orbit, spectrum, mineral, lens, galaxy, enzyme, circuit, laser, hypothesis, particle, instrument",
        "observatory, laboratory, field camp, institute, planetarium, quarry, clean room, expedition",
        "observed, discovered, heated, dissolved, isolated, calibrated, proved, classified, proposed, confirmed, "
        "aligned",
        "bright, distant, tiny, transparent, magnetic, toxic, unknown, stable, radioactive, pure, organic, rare, "
        "massive",
    ),
)

NAMES = _listed(
    "Anna, Peter, Maria, Thomas, Julia, Daniel, Sofia, Martin, Laura, Victor, Helen, Oscar, Clara, Simon, Irene, "
    "Felix, Nora, Hugo, Alice, Robert, Emma, George, Lucy, Walter, Ruth, Henry, Ivan, Grace, Omar, Leila, Kenji, "
    "Priya, Chen, Amara"
)
MOMENTS = _listed(
    "in the morning, at noon, before sunset, after lunch, last winter, on Monday, on Friday, one evening, in spring, "
    "at midnight, two days later, a week earlier, during the break, every summer, that same night, in October, at the "
    "weekend, long ago, for the first time, at the last moment, as usual, without warning, in the end"
)
MANNERS = _listed(
    "slowly, carefully, quickly, quietly, gladly, secretly, together, alone, by hand, with great care, by mistake, "
    "again, with a smile, at once, step by step, without help, in silence, on purpose, twice, in a hurry, patiently, "
    "eagerly"
)
UNITS = _listed(
    "minutes, hours, days, metres, kilograms, litres, pages, euros, steps, degrees, weeks, seconds, miles, years"
)
COUNTS = _listed(
    "2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 20, 24, 25, 30, 40, 48, 50, 64, 75, 80, 90, 100, 120, 144, 250, 365"
)
OPINIONS = _listed(
    "nobody had expected that, this was no surprise, it was worth the trouble, the result speaks for itself, there was "
    "no other way, the rest is easy to guess, it could have been worse, some still disagree, the cost was low, it took "
    "longer than planned, everyone was satisfied, the reason remained unclear, a second attempt would follow, that is "
    "how it began, the old rule no longer holds, most people would do the same"
)

PATTERNS = (
    "The {person} {did} the {thing} {when}.",
    "The {quality} {thing} stood in the {place}, and {opinion}.",
    "{When}, {name} and the {person} {did} a {quality} {thing} {how}.",
    "{name} asked whether the {thing} was {quality} enough for the {place}.",
    "After {count} {unit}, the {person} {did} the {thing} {how}.",
    "There was a {quality} {thing} next to the {other}, but {opinion}.",
    '"Where is the {thing}?" asked the {person}. "It is in the {place}," said {name}.',
    "If the {thing} is {quality}, then the {other} should be {more}, too.",
    "The {person} never {did} the {thing}; {opinion}.",
    "Between the {place} and the {thing} lay {count} {unit} of work.",
    "A {thing} needs a {quality} {other}, which the {person} {did} {when}.",
    "Most of the time a {quality} {thing} is better than a {more} {other}.",
    "{name} {did} the {thing} in the {place} {how}, because the {other} was too {quality}.",
    "How can a {person} know that the {thing} is {quality}? {Opinion}.",
    "They had {count} of them: a {thing}, a {other}, and whatever the {person} {did} {when}.",
    "In the {place} one finds the {thing}, the {other} and, with some luck, a {quality} {person}.",
    "The first {thing} was {quality}, the second was {more}, and the third cost {count} {unit}.",
    "Please note that the {thing} must be {quality} before the {person} comes to the {place}.",
    "{When} the {place} was empty; only {name} {did} the {thing} {how}.",
    "What the {person} {did} {when} was not the {thing} but the {other}, and {opinion}.",
    "It is {count} {unit} from the {place} to the next {thing}, so {name} left {how}.",
    "Neither the {person} nor {name} had seen such a {quality} {thing} before.",
    "While {name} {did} the {other}, the {person} waited in the {place} for {count} {unit}.",
    "Step one: find the {thing}. Step two: make sure that it is {quality}. Step three: call the {person}.",
    "The {person} explained to {name} why every {thing} in the {place} has its own {other}.",
    "Some say the {thing} is {quality}; others call it {more}. {Opinion}.",
    "Once the {person} had gone, {name} {did} the {quality} {thing} and closed the door of the {place}.",
    "About {count} {unit} later the {thing} and the {other} were back where the {person} wanted them.",
)
"""`{other}` is another thing and `{more}` another quality than the ones named before."""
