// Sends a picture to the server of this page and shows what it answers.

const SHOWN = 5;
const byId = (id) => document.getElementById(id);
const networks = await (await fetch("about")).json();
let waiting = new AbortController();
let matrices = null;

// What is there before a picture

function showNetworks() {
  for (const network of ["twin", "deconv"]) {
    byId(`${network}-name`).textContent = networks[network].replaceAll(/[_.]/g, "$&\u200b"); // may break there
  }
  const known = networks.classes.length
    ? `They know ${list(networks.classes)}, and nothing else: whatever they see becomes one of these.`
    : `They know ${networks.class_count} classes: whatever they see becomes one of these.`;
  const alike = "The weights were carried over from batch norm, and so both answer alike.";
  byId("known").textContent = networks.carried_over ? `${known} ${alike}` : known;
  const [height, width] = networks.window;
  const values = height * width * networks.channels;
  const whose = networks.statistics === "network"
    ? "by what the network has learnt of its training pictures"
    : "by the statistics of your picture, as in training, since these weights bring none along";
  const colours = networks.channels === 3 ? `: ${height * width} red ones, then green, then blue` : "";
  byId("how").textContent = `The layer takes windows of ${height} × ${width} pixels, ${values} values each${colours}.`
    + ` Whitening takes out what the values have in common, here ${whose}.`
    + ` It takes ${networks.steps} Newton-Schulz steps; with more it would take out more.`;
  showClasses(Array.from({ length: Math.min(SHOWN, networks.class_count) }, () => ({ name: "", twin: null, deconv: null })));
}

function list(names) {
  return new Intl.ListFormat("en").format(names);
}

// What is asked

async function look(file) {
  waiting.abort();
  waiting = new AbortController();
  if (!file) return say("That was no file. Drop a picture from your computer.", true);
  if (file.size > networks.most_bytes) {
    return say(`The file has more than ${networks.most_bytes >> 20} MB; make it smaller.`, true);
  }
  say("Looking …");
  const { signal } = waiting;
  try {
    const answer = await fetch("compare", { method: "POST", body: file, signal });
    const found = await answer.json();
    if (found.error) return say(sentence(found.error), true);
    show(found);
  } catch (error) {
    if (error.name !== "AbortError") say("The server does not answer. Is timm-deconv demo still running?", true);
  }
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function say(text, wrong = false) {
  const message = byId("message");
  message.textContent = text;
  message.classList.toggle("wrong", wrong);
}

// What is answered

function show(found) {
  const [first] = found.classes;
  const names = { twin: best(found.classes, "twin"), deconv: best(found.classes, "deconv") };
  say(names.twin === names.deconv ? `Both say: ${first.name}.` : `Batch norm says ${names.twin}, deconvolution ${names.deconv}.`);
  showClasses(found.classes);
  showImage("picture", found.picture, "Your picture");
  showImage("seen", found.seen, `Your picture at ${found.size.join(" by ")} pixels`);
  showImage("whitened", found.whitened, "Your picture after whitening");
  byId("seen-note").textContent = `your picture as the networks take it, ${found.size.join("\u00a0×\u00a0")} pixels`;
  matrices = { before: found.before, after: found.after };
  const [before, after] = found.left.map((value) => value.toFixed(2));
  byId("before-note").textContent = `${before} on average between two values of a window`;
  byId("after-note").textContent = `${after} on average`;
  byId("before").ariaLabel = `Correlations before whitening, on average ${before}`;
  byId("after").ariaLabel = `Correlations after whitening, on average ${after}`;
  drawMatrices();
}

function best(classes, network) {
  return classes.reduce((best, each) => (each[network] > best[network] ? each : best)).name;
}

function showImage(id, address, alt) {
  Object.assign(byId(id), { src: address, alt, hidden: false });
}

function showClasses(classes) {
  byId("classes").tBodies[0].replaceChildren(...classes.map((each) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = each.name;
    row.append(name, bar("twin", each.twin), bar("deconv", each.deconv));
    return row;
  }));
}

function bar(network, share) {
  const cell = document.createElement("td");
  cell.className = network;
  const line = document.createElement("div");
  line.className = "bar";
  const track = document.createElement("i");
  track.style.setProperty("--share", share ?? 0);
  const number = document.createElement("span");
  number.textContent = share === null ? "" : percent(share);
  line.append(track, number);
  cell.append(line);
  return cell;
}

function percent(share) {
  return share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

// Matrices, in the colours of the page

function drawMatrices() {
  if (!matrices) return;
  const style = getComputedStyle(document.documentElement);
  const [negative, zero, positive] = ["negative", "zero", "positive"].map((name) => rgb(style.getPropertyValue(`--${name}`).trim()));
  for (const [id, rows] of Object.entries(matrices)) {
    const canvas = byId(id);
    canvas.width = canvas.height = rows.length;
    const image = new ImageData(rows.length, rows.length);
    rows.flat().forEach((value, index) => {
      const end = value < 0 ? negative : positive;
      const colour = zero.map((part, channel) => part + Math.min(Math.abs(value), 1) * (end[channel] - part));
      image.data.set([...colour, 255], 4 * index);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.hidden = false;
  }
}

function rgb(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

// What people do

const drop = byId("drop");
byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) look(file);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  look(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  look(event.clipboardData.files[0]);
});
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", async () => look(await (await fetch(button.dataset.example)).blob()));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMatrices);
showNetworks();
document.querySelector("main").classList.add("ready");
