import MooncakeP2P

/// Formats the store's results as lines, for people or as JSON.
struct StoreReport {
  let isJSON: Bool

  func print(published info: PayloadInfo, files: [String]) {
    if isJSON { return printLine(published(info, files)) }
    printLine(
      "published \(info.name) version \(version(info)) size \(info.size) in \(files.count) file(s),"
        + " \(info.shardCount) shard(s) of \(ByteCount(info.shardBytes).description)")
  }

  /// The object of `publish`, also for its ready file.
  func published(_ info: PayloadInfo, _ files: [String]) -> String {
    var json = object(info)
    json.add("files", files)
    return json.text
  }

  func print(_ result: GetResult, files: [String]) {
    let seconds = Double(result.nanoseconds) / 1e9
    if isJSON {
      var json = JSONObject()
      json.add("name", result.info.name)
      if let version = result.info.version { json.add("version", version.description) }
      json.add("size", result.info.size)
      json.add("seconds", seconds, places: 6)
      json.add("verified", result.isVerified)
      json.add("files", files)
      json.add("sources", result.sources.map(object))
      return printLine(json.text)
    }
    let rate = seconds > 0 ? Double(result.info.size) / seconds : 0
    printLine(
      "got \(result.info.name) version \(version(result.info)) size \(result.info.size) in "
        + "\(decimal(seconds, places: 3)) s, \(readableBytes(UInt64(rate)))/s, "
        + (result.isVerified ? "verified" : "not verified: it was registered without digests"))
    for source in result.sources {
      var line =
        "  \(readableBytes(source.byteCount)) from \(source.segment)"
        + (source.isOrigin ? ", the origin" : "")
      if source.corruptShardCount > 0 { line += ", \(source.corruptShardCount) corrupt shard(s)" }
      printLine(line)
    }
  }

  func print(listed payloads: [PayloadInfo]) {
    if isJSON {
      for payload in payloads { printLine(object(payload).text) }
      return
    }
    let titles = ["name", "version", "bytes", "shards", "holders"]
    let widest = payloads.map(\.name.count).max() ?? 0
    let table = TextTable(titles: titles, minimum: [widest, 32, 14, 8, 7])
    printLine(table.line(titles))
    for payload in payloads {
      printLine(
        table.line([
          payload.name, version(payload), "\(payload.size)", "\(payload.shardCount)",
          "\(payload.holderCount)",
        ]))
    }
  }

  func print(_ info: PayloadInfo, holders: [PayloadHolder]) {
    if isJSON {
      var json = object(info)
      json.add("buffer_sizes", info.bufferSizes)
      json.add("holders", holders.map(object))
      return printLine(json.text)
    }
    printLine("name      \(info.name)")
    printLine("version   \(version(info))")
    printLine("size      \(info.size) bytes in \(info.bufferSizes.count) buffer(s)")
    printLine(
      "shards    \(info.shardCount) of \(ByteCount(info.shardBytes).description)"
        + (info.isWritable ? ", writable, without digests" : ""))
    for holder in holders {
      var line = "holder    \(holder.segment)"
      if holder.isOrigin { line += ", origin" }
      line += holder.isComplete ? ", complete" : ", fetching"
      if let other = holder.version, other != info.version { line += ", version \(other)" }
      printLine(line)
    }
  }

  func print(_ change: PayloadChange) {
    let (word, info): (String, PayloadInfo?) =
      switch change {
      case .appeared(let info): ("appeared", info)
      case .changed(let info): ("changed", info)
      case .vanished: ("vanished", nil)
      }
    var json = JSONObject()
    json.add("change", word)
    if let info {
      add(info, to: &json)
      return printLine(
        isJSON ? json.text : "\(word) \(info.name) version \(version(info)) size \(info.size)")
    }
    guard case .vanished(let name) = change else { return }
    json.add("name", name)
    printLine(isJSON ? json.text : "\(word) \(name)")
  }

  private func version(_ info: PayloadInfo) -> String { info.version?.description ?? "-" }

  private func object(_ info: PayloadInfo) -> JSONObject {
    var json = JSONObject()
    add(info, to: &json)
    return json
  }

  private func add(_ info: PayloadInfo, to json: inout JSONObject) {
    json.add("name", info.name)
    if let version = info.version { json.add("version", version.description) }
    json.add("size", info.size)
    json.add("shard_bytes", info.shardBytes)
    json.add("shards", info.shardCount)
    json.add("published_ms", info.publishedMilliseconds)
    json.add("writable", info.isWritable)
    json.add("holder_count", info.holderCount)
  }

  private func object(_ source: GetResult.Source) -> JSONObject {
    var json = JSONObject()
    json.add("segment", source.segment)
    json.add("origin", source.isOrigin)
    json.add("bytes", source.byteCount)
    json.add("corrupt_shards", source.corruptShardCount)
    return json
  }

  private func object(_ holder: PayloadHolder) -> JSONObject {
    var json = JSONObject()
    json.add("segment", holder.segment)
    if let version = holder.version { json.add("version", version.description) }
    json.add("origin", holder.isOrigin)
    json.add("complete", holder.isComplete)
    return json
  }
}
