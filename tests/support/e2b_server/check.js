// E2B's JavaScript SDK, unmodified, against the server of E2B_API_URL; `node check.js FOLDER_OF_THE_SDK` prints what it saw.

const { Sandbox } = require(process.argv[2])

async function main() {
  const sandbox = await Sandbox.create({ metadata: { from: 'js 1' }, timeoutMs: 60_000 })
  const seen = { id: sandbox.sandboxId }

  await sandbox.files.write('folder/file', 'hällo')
  seen.read = await sandbox.files.read('folder/file')

  seen.streamed = []
  await sandbox.commands.run('for i in 1 2 3; do echo $i; sleep 0.2; done', { onStdout: (data) => seen.streamed.push(data) })
  seen.failed = await sandbox.commands.run('exit 7').catch((error) => error.exitCode)

  const background = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const killed = await sandbox.commands.kill(background.pid)
  seen.background = [killed, await background.wait().catch((error) => error.error)]

  const pages = Sandbox.list({ query: { metadata: { from: 'js 1' } } })
  seen.listed = (await pages.nextItems()).length

  await sandbox.setTimeout(200_000)
  const info = await Sandbox.getInfo(sandbox.sandboxId)
  seen.timeout = info.endAt - Date.now() > 150_000

  seen.killed = [await sandbox.kill(), await sandbox.kill()]
  seen.gone = await sandbox.commands.run('true').catch((error) => error.constructor.name)
  console.log(JSON.stringify(seen))
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
