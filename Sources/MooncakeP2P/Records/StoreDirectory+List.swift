import MooncakeBase
import MooncakeEngine
import MooncakeMetadata

extension StoreDirectory {
  /// Every payload whose name begins with `start`, in order of names. One that nobody stands for by
  /// name is told as the newest version that somebody has all of.
  package func list(
    prefix start: String, _ call: MetadataCall
  ) throws(EngineError) -> [PayloadInfo] {
    // Names are bytes: texts that only look alike are different ones.
    var infos: [MetadataKey: PayloadInfo] = [:]
    try store.forEach(prefix: headKey(start), call) { entry throws(EngineError) in
      guard let head = head(name(ofHead: entry.key), in: entry.value) else { return }
      infos[MetadataKey(head.name)] = head.summary.info(holderCount: 0)
    }
    var headless: [MetadataKey: [HeldVersion]] = [:]
    try store.forEach(prefix: holderKeys(startingWith: start), call) { entry throws(EngineError) in
      guard let record = record(entry) else { return }
      let key = MetadataKey(record.name)
      if infos[key] == nil {
        Self.note(record, &headless[key, default: []])
      } else if infos[key]?.version == record.version {
        infos[key]?.holderCount += 1
      }
    }
    if !headless.isEmpty {
      // The holders of a removed name may not have learned of it yet.
      let removals = try removals(startingWith: start, call) { headless[$0] != nil }
      for (key, versions) in headless {
        guard let newest = Self.listed(versions, removals[key] ?? Removals()) else { continue }
        infos[key] = newest.summary.info(holderCount: newest.holderCount)
      }
    }
    return infos.sorted { $0.key < $1.key }.map(\.value)
  }

  /// Names that are asked for one by one; to walk over all records is less work for more.
  private static let singleCount = 16

  /// As what some names that begin with `start` are listed, by name, and what was removed of those
  /// that have no head.
  func lookUp(
    _ names: [MetadataKey], startingWith start: String, _ call: MetadataCall
  ) throws(EngineError) -> (listed: [MetadataKey: PayloadSummary], [MetadataKey: Removals]) {
    var listed: [MetadataKey: PayloadSummary] = [:]
    var removals: [MetadataKey: Removals] = [:]
    if names.count <= Self.singleCount {
      for name in names {
        listed[name] = try head(of: name, call)
        if listed[name] != nil { continue }
        let versions = try versions(of: name.text, call)
        removals[name] = try self.removals(of: name.text, call)
        listed[name] = Self.listed(versions, removals[name]!)?.summary
      }
      return (listed, removals)
    }
    let asked = Set(names)
    var held: [MetadataKey: [HeldVersion]] = [:]
    try store.forEach(prefix: holderKeys(startingWith: start), call) { entry throws(EngineError) in
      guard let record = record(entry) else { return }
      let name = MetadataKey(record.name)
      if asked.contains(name) { Self.note(record, &held[name, default: []]) }
    }
    removals = try self.removals(startingWith: start, call) { asked.contains($0) }
    for (name, versions) in held {
      listed[name] = Self.listed(versions, removals[name] ?? Removals())?.summary
    }
    // Somebody may stand for them by now.
    let rest = names.filter { listed[$0] == nil }
    let texts = try store.values(of: rest.map { headKey($0.text) }, call)
    for (name, text) in zip(rest, texts) { listed[name] = head(name.text, in: text)?.summary }
    return (listed, removals)
  }

  private func head(
    of name: MetadataKey, _ call: MetadataCall
  ) throws(EngineError) -> PayloadSummary? {
    head(name.text, in: try store.values(of: [headKey(name.text)], call)[0])?.summary
  }
}
