const model = {{ model | tojson }};
const element = id => document.getElementById(id);
const pause = () => new Promise(resolve => setTimeout(resolve)); // in which the browser draws

let ort, tokenizer, textEncoder;
let changed = false, working = false;

function say(text, done = null, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
  element("progress").hidden = done === null;
  element("progress").value = done ?? 0;
}

const fail = error => say(error.message ?? `${error}`, null, true);

/** Fetch a file, and tell how much of it is there. */
async function download({ path, bytes }) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  const data = new Uint8Array(bytes);
  let filled = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return data;
    data.set(value, filled);
    filled += value.length;
    say(`Loading ${path}: ${(filled / 1e6).toFixed(0)} of ${(bytes / 1e6).toFixed(0)} MB`, filled / bytes);
  }
}

async function loadTextEncoder() {
  if (location.protocol === "file:")
    throw new Error("Browsers load models only from a web server. In this folder: python -m http.server, then open http://localhost:8000");
  ort = await import("./{{ engine }}");
  const { Tokenizer } = await import("./{{ tokenizers }}");
  const description = await (await fetch("{{ tokenizer }}")).json();
  tokenizer = { text: new Tokenizer(description, {}), padding: description.padding };
  textEncoder = await ort.InferenceSession.create(await download(model.text_encoder));
}

/** Drop capitals and punctuation, as some models were trained without. */
function canonicalize(text) {
  return text.replaceAll("_", " ").replace(/[!-/:-@[-`{-~]/g, "").toLowerCase().replace(/\s+/g, " ").trim();
}

/** Make tokens of a text, padded and cut to the model's length, with the token of the end last. */
function tokenize(text) {
  const { strategy, pad_id } = tokenizer.padding;
  const { ids } = tokenizer.text.encode(model.canonical ? canonicalize(text) : text);
  const tokens = new BigInt64Array(strategy.Fixed).fill(BigInt(pad_id));
  const cut = ids.length > tokens.length ? [...ids.slice(0, tokens.length - 1), ids.at(-1)] : ids;
  tokens.set(cut.map(BigInt));
  return new ort.Tensor("int64", tokens, [1, tokens.length]);
}

const encodeText = async text => (await textEncoder.run({ input_ids: tokenize(text) })).text_embeds.data;

/** Answer what the page asks, by its own `answer`; changes that come meanwhile begin it again. */
async function update() {
  changed = true;
  if (working) return;
  working = true;
  while (changed) {
    changed = false;
    try {
      await answer();
    } catch (error) {
      element("answers").hidden = true; // of the question before
      fail(error);
    }
  }
  working = false;
}
