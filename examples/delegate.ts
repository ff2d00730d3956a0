/**
 * Hand a task to a remote agent from a TypeScript program, over MCP, and apply what comes back.
 *
 *     npm install @modelcontextprotocol/client
 *     node examples/delegate.ts "Add a docstring to every public function" --verify "python3 -m compileall -q ."
 *
 * It works on the repository in the current folder, and needs `cloudagent-mcp` on the PATH and a credential for the model
 * in the environment. With CLOUDAGENT_URL and CLOUDAGENT_API_KEY it asks that server instead, which fetches what
 * `--repository` names and writes nothing here: it says which command does. Node 22.18 or later runs it as it is.
 */
import { parseArgs } from "node:util";
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

type Answer = Record<string, any>;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { verify: { type: "string" }, repository: { type: "string" } },
});
const { CLOUDAGENT_URL: url, CLOUDAGENT_API_KEY: key } = process.env;

const client = new Client({ name: "delegate", version: "1.0.0" }, { versionNegotiation: { mode: "auto" } });
await client.connect(
  url
    ? new StreamableHTTPClientTransport(new URL("/mcp", url), {
        requestInit: { headers: { Authorization: `Bearer ${key}` } },
      })
    : new StdioClientTransport({ command: "cloudagent-mcp", env: process.env as Record<string, string> }),
);

async function call(tool: string, given: Answer): Promise<Answer> {
  const result = await client.callTool({ name: tool, arguments: given });
  const answer = result.structuredContent as Answer;
  if (result.isError) throw new Error(`${answer.code}: ${answer.detail} ${answer.remedy}`);
  return answer;
}

try {
  let task = await call("submit_task", { prompt: positionals[0], ...values });
  while (!task.completed_at) {
    task = await call("get_task", { task_id: task.task_id, wait_seconds: 50 });
    console.log(task.status, task.phase ?? "");
  }
  console.log(task.result?.summary ?? task.error.message);
  if (task.status !== "completed" || task.verdict === "failed") process.exitCode = 1;
  else {
    const applied = await call("apply_task", { task_id: task.task_id });
    for (const file of applied.files) console.log(file.change, file.path);
    console.log(applied.command ?? applied.message);
  }
} catch (error) {
  console.error((error as Error).message);
  process.exitCode = 1;
} finally {
  await client.close();
}
