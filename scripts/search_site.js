// The first hits of the site's search: node scripts/search_site.js out/site/html 'loss is nan' ...
// Runs the worker that searches in the browser. Prints {query: [pages with their headings]} as JSON.

const fs = require('fs')
const path = require('path')

const [site, ...queries] = process.argv.slice(2)
const workers = path.join(site, 'assets/javascripts/workers')
const worker = fs.readdirSync(workers).find((name) => name.startsWith('search.'))
const index = JSON.parse(fs.readFileSync(path.join(site, 'search.json'), 'utf8'))

let answered
const self = { postMessage: (message) => answered(message) }
new Function('self', fs.readFileSync(path.join(workers, worker), 'utf8'))(self)
const ask = (type, data) => new Promise((resolve) => {
  answered = resolve
  self.onmessage({ data: structuredClone({ type, data }) })
})
const all = {
  input: { type: 'operator', data: { operator: 'and', operands: [] } },
  aggregation: { input: [{ type: 'term', data: { field: 'tags' } }] },
}

async function main() {
  const hits = {}
  await ask(0, index)
  for (const input of queries) {
    const found = await ask(2, { input, filter: all })
    hits[input] = found.data.items.map((item) => index.items[item.id].location)
  }
  console.log(JSON.stringify(hits))
}

main()
