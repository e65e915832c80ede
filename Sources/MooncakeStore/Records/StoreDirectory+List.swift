import MooncakeEngine

extension StoreDirectory {
  /// Every payload whose name begins with `start`, in order of names. One that nobody stands for by
  /// name is told as the newest version that somebody has all of.
  package func list(
    prefix start: String, _ call: MetadataCall
  ) throws(EngineError) -> [PayloadInfo] {
    // Names are bytes: texts that only look alike are different ones.
    var infos: [MetadataKey: PayloadInfo] = [:]
    try store.forEach(prefix: headKey(start), call) { entry throws(EngineError) in
      guard let head = try? PayloadHead(json: entry.value),
        headKey(head.name).utf8.elementsEqual(entry.key.utf8)
      else { return }
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

  /// As which one name is listed; nil if it is not.
  func listed(
    _ name: String, _ call: MetadataCall
  ) throws(EngineError) -> PayloadSummary? {
    if let head = head(name, in: try store.get(headKey(name), call)) { return head.summary }
    let versions = try versions(of: name, call)
    if !versions.contains(where: \.isCurrent) { return nil }
    return Self.listed(versions, try removals(of: name, call))?.summary
  }
}
