// A picture in, probabilities and masks out, on the visitor's own device.
import {inPicture, networkImage, placement} from "./pixels.js";

// Larger pictures are reduced first: browsers limit the size of a canvas, and no screen shows more.
const LARGEST_SIDE = 2048;
const element = id => document.getElementById(id);
const body = document.body;
let known, session, ort, shown = null, chosen = 0, queue = Promise.resolve();

function say(text, state) {
  element("status").textContent = text;
  body.dataset.state = state;
}

async function start() {
  known = await (await fetch("model.json")).json();
  element("model").textContent = `Model ${known.weights}, ${known.precision}; explains the classifier ${known.explained_classifier ?? "unknown"}.`;
  document.title = `Where the evidence lies: ${known.classes.length} classes`;
  const [script, , binary] = known.runtime;
  for (const name of known.runtime) {
    if (!(await fetch(`runtime/${name}`, {method: "HEAD"})).ok) {
      throw new Error(`runtime/${name} is missing: copy ${known.runtime.join(", ")} from node_modules/onnxruntime-web/dist into the folder runtime`);
    }
  }
  ort = await import(`./runtime/${script}`);
  const folder = new URL("runtime/", location.href);
  ort.env.wasm.wasmPaths = {mjs: new URL(known.runtime[1], folder).href, wasm: new URL(binary, folder).href};
  // Several threads need shared memory, which a page has only behind the headers of cross-origin isolation.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  session = await ort.InferenceSession.create(known.file, {executionProviders: ["wasm"]});
  for (const name of known.examples) {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = `examples/${name}`;
    image.alt = `Example ${element("examples").childElementCount + 1}`;
    button.append(image);
    button.addEventListener("click", async () => explain(await (await fetch(image.src)).blob()));
    element("examples").append(button);
    element("examples").hidden = false;
  }
  element("file").disabled = false;
  say("Ready.", "ready");
}

// One picture after the other: a session answers one call at a time.
function explain(blob) {
  queue = queue.then(() => compute(blob)).catch(error => say(`This picture cannot be explained: ${error.message ?? error}`, "error"));
  return queue;
}

async function compute(blob) {
  say("Computing ...", "busy");
  await new Promise(resolve => setTimeout(resolve, 20)); // lets the message appear
  const bitmap = await createImageBitmap(blob, {imageOrientation: "from-image", premultiplyAlpha: "none"});
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const W = Math.max(1, Math.round(bitmap.width * scale)), H = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = new OffscreenCanvas(W, H), context = canvas.getContext("2d", {willReadFrequently: true});
  context.fillStyle = "white"; // what is transparent is shown on white
  context.fillRect(0, 0, W, H);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, W, H);
  bitmap.close();
  const pixels = context.getImageData(0, 0, W, H).data;
  const {height: h, width: w} = known, place = placement(known.geometry, H, W, h, w);
  const input = new ort.Tensor("float32", networkImage(pixels, W, place, h, w, known.padding), [1, 3, h, w]);
  const began = performance.now(), answer = await session.run({image: input}), milliseconds = performance.now() - began;
  const probabilities = [...answer.probabilities.data];
  if (probabilities.some(p => !Number.isFinite(p))) throw new Error("the model's answer is not a number");
  const classes = answer.classes ? [...answer.classes.data].map(Number) : known.classes.map((_, k) => k);
  const [, , rows, columns] = answer.masks.dims, size = rows * columns;
  const masks = new Map(classes.map((k, i) => [k, answer.masks.data.subarray(i * size, (i + 1) * size)]));
  shown = {pixels, H, W, h, w, rows, columns, place, probabilities, masks};
  list(classes.sort((a, b) => probabilities[b] - probabilities[a]));
  element("result").hidden = false;
  say(`Computed on this device in ${Math.round(milliseconds)} ms.`, "done");
}

function predicted(k, best) {
  return known.task === "multiclass" ? k === best : shown.probabilities[k] >= known.threshold;
}

function list(classes) {
  element("classes").replaceChildren(...classes.map(k => {
    const button = document.createElement("button"), name = document.createElement("b"), share = document.createElement("small"), meter = document.createElement("meter");
    name.textContent = known.classes[k];
    share.textContent = `${(100 * shown.probabilities[k]).toFixed(1)} %`;
    meter.value = shown.probabilities[k];
    button.dataset.class = k;
    button.dataset.probability = shown.probabilities[k];
    button.classList.toggle("predicted", predicted(k, classes[0]));
    button.append(name, share, meter);
    button.addEventListener("click", () => choose(k));
    return button;
  }));
  choose(classes[0]);
}

function choose(k) {
  chosen = k;
  for (const button of element("classes").children) button.setAttribute("aria-pressed", String(Number(button.dataset.class) === k));
  const {rows, columns, place, h, w, H, W} = shown;
  shown.mask = inPicture(shown.masks.get(k), rows, columns, place, h, w, H, W);
  draw();
}

function grey(mask) {
  const {H, W} = shown, image = new ImageData(W, H);
  for (let i = 0; i < mask.length; i++) {
    image.data.fill(Math.round(255 * mask[i]), 4 * i, 4 * i + 3);
    image.data[4 * i + 3] = 255;
  }
  return image;
}

function draw() {
  const {pixels, mask, H, W} = shown, canvas = element("view"), context = canvas.getContext("2d");
  const mode = document.querySelector("[name=show]:checked").value, name = known.classes[chosen];
  canvas.width = W;
  canvas.height = H;
  context.putImageData(grey(mask), 0, 0);
  element("save").href = canvas.toDataURL("image/png");
  element("save").download = `mask_${name.replace(/[^\p{L}\p{N}]+/gu, "_")}.png`;
  if (mode !== "mask") {
    const image = new ImageData(new Uint8ClampedArray(pixels), W, H);
    // What is not kept goes towards a light grey without colour.
    for (let i = 0; mode === "kept" && i < mask.length; i++) {
      const at = 4 * i, pale = 150 + 0.25 * (pixels[at] + pixels[at + 1] + pixels[at + 2]) / 3;
      for (let c = 0; c < 3; c++) image.data[at + c] = mask[i] * pixels[at + c] + (1 - mask[i]) * pale;
    }
    context.putImageData(image, 0, 0);
  }
  const area = mask.reduce((a, b) => a + b, 0) / mask.length;
  element("caption").textContent = `${name}: probability ${(100 * shown.probabilities[chosen]).toFixed(1)} %, mask covers ${(100 * area).toFixed(1)} %`;
}

const drop = element("drop");
element("file").addEventListener("change", event => event.target.files[0] && explain(event.target.files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file && session) explain(file);
  });
}
document.addEventListener("paste", event => {
  const file = event.clipboardData.files[0];
  if (file && session) explain(file);
});
for (const input of document.querySelectorAll("[name=show]")) input.addEventListener("change", () => shown && draw());
start().catch(error => say(`The model cannot be loaded: ${error.message ?? error}.`, "error"));
