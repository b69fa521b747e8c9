// Asks a knowledge base and prints the answer as it comes. Node 18 or newer, no packages.
//   node ask.mjs http://localhost:8080 handbook "What may a hotel cost?"
const [url, base, question] = process.argv.slice(2);
const response = await fetch(`${url}/api/v1/knowledge/${encodeURIComponent(base)}:askStream`, {
  method: "POST",
  headers: {
    "content-type": "application/json",
    ...(process.env.FOREBAY_KEY && { authorization: `Bearer ${process.env.FOREBAY_KEY}` }),
  },
  body: JSON.stringify({ question }),
});
if (!response.ok) {
  console.error((await response.json()).error.message);
  process.exit(1);
}
const citations = [];
let rest = "";
for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
  const frames = (rest + piece).split("\n\n");
  rest = frames.pop();
  for (const frame of frames) {
    const line = frame.split("\n").find((l) => l.startsWith("data: "));
    if (!line) continue; // a heartbeat
    const event = JSON.parse(line.slice(6));
    if (event.error) throw new Error(event.error.message);
    if (event.token) process.stdout.write(event.token.text);
    if (event.citation) citations.push(event.citation);
  }
}
console.log();
for (const c of citations) {
  console.log(`[${c.number}] ${c.name}, page ${c.page}, ${c.verified ? "verified" : "NOT VERIFIED"}: "${c.quote}"`);
}
